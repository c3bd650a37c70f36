"""What must hold while sixteen clients stream: adapters replaced every 100 ms, and the engine killed."""

import asyncio
import itertools
import os
import random
import socket
import string
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from onebase_server.model.config import ModelConfig

from ..server.api.conftest import BASE_NAME, ENGINE, tiny_base, write_peft

__all__ = ["tiny_base"]

CLIENTS = 16
SWAP_SECONDS = 20
SWAP_PERIOD = 0.1
CHECKED = 120
"""How many of the streamed texts are asked for once more, alone."""


@dataclass(frozen=True)
class Text:
    """What a client got."""

    prompt: str
    text: str
    version: str


class Server:
    """`onebase serve` in a process of its own, as in production, so that the test's clients do not slow it down."""

    def __init__(self, process: psutil.Popen, url: str) -> None:
        self._process = process
        self.url = url

    @property
    def engine(self) -> psutil.Process:
        """The engine process."""
        (engine,) = (child for child in self._process.children() if "onebase_server.engine.process" in child.cmdline())
        return engine

    def status(self, path: str) -> int:
        """What a GET is answered with; 0 while nobody listens."""
        try:
            return httpx.get(self.url + path, timeout=30).status_code
        except httpx.TransportError:
            return 0

    def metric(self, name: str) -> float:
        """The one sample of a metric."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=30).text)
        (value,) = (sample.value for family in families for sample in family.samples if sample.name == name)
        return value

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Wait for something to become true, while this test's streams go on."""
        deadline = time.monotonic() + 60
        while not await asyncio.to_thread(is_true):
            assert time.monotonic() < deadline, "it did not become true in time"
            await asyncio.sleep(0.02)


@pytest.fixture
async def server(tiny_base: Path, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that no other test shares, with room for a few adapters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ENGINE | {"kernels": "auto", "max_num_seqs": 32, "base": tiny_base, "port": port}
    settings |= {"store": tmp_path / "store", "cache_dir": tmp_path / "cache", "log_level": "error"}
    environment = os.environ | {f"ONEBASE_{name.upper()}": str(value) for name, value in settings.items()}
    with psutil.Popen([sys.executable, "-m", "onebase_server", "serve"], env=environment) as process:
        running = Server(process, f"http://127.0.0.1:{port}")
        try:
            await running.until(lambda: running.status("/ready") == 200)
            yield running
        finally:
            process.terminate()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    """The official client, without retries: a failure shall be seen."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def make_upload(tiny_base: Path, tmp_path: Path) -> Callable[[int], bytes]:
    """A zip of the adapter with that number; each is another."""
    layout = ModelConfig.from_directory(tiny_base).adapter_layout()

    def make(number: int) -> bytes:
        directory = write_peft(tmp_path / "peft", layout, seed=number)
        archive = BytesIO()
        with zipfile.ZipFile(archive, "w") as zipped:
            for file in directory.iterdir():
                zipped.write(file, file.name)
        return archive.getvalue()

    return make


async def upload(http: httpx.AsyncClient, name: str, archive: bytes) -> int:
    """Publish; returns the version."""
    response = await http.post("/v1/adapters", data={"name": name}, files={"archive": ("a.zip", archive)})
    assert response.status_code == 201, response.text
    return int(response.json()["version"])


async def stream(client: AsyncOpenAI, model: str, prompt: str, max_tokens: int) -> Text:
    """One greedy stream; every chunk of it must name the same version."""
    chunks = await client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    text, versions = "", set()
    async for chunk in chunks:
        text += chunk.choices[0].text
        versions.add(chunk.system_fingerprint)
    assert len(versions) == 1, f"one request, several versions: {versions}"
    return Text(prompt, text, str(versions.pop()))


async def assert_said_by(client: AsyncOpenAI, text: Text) -> None:
    """The version that a text names says the same alone, up to a tie that rounding may break either way.

    A batch rounds in another order than a single row, by about 1e-6; another version's choice would be far off.
    """
    alone = await client.completions.create(
        model=text.version,
        prompt=text.prompt,
        max_tokens=40,
        temperature=0,
        logprobs=2,
        extra_body={"ignore_eos": True},
    )
    choice = alone.choices[0]
    if choice.text == text.text:
        return
    index = next(i for i, (a, b) in enumerate(zip(choice.text, text.text, strict=False)) if a != b)
    best = choice.logprobs.top_logprobs[index]  # tokens are single characters
    assert text.text[index] in best, f"{text.version} would not have said {text.text!r}, but {choice.text!r}"
    assert max(best.values()) - best[text.text[index]] < 1e-4


def random_prompt(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters, k=rng.randrange(5, 40)))


async def test_versions_published_every_100_ms_fail_no_stream_and_mix_in_none(
    server: Server, client: AsyncOpenAI, make_upload: Callable[[int], bytes]
) -> None:
    # Made before the clock starts, which is for the server's work.
    uploads = [make_upload(number) for number in range(round(SWAP_SECONDS / SWAP_PERIOD))]
    texts: list[Text] = []

    async def keep_streaming(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < deadline:
            texts.append(await stream(client, "swapped", random_prompt(rng), max_tokens=40))

    async def keep_publishing(http: httpx.AsyncClient) -> int:
        """Each upload at its time, or as soon as the one before is done; how many there was time for."""
        for number, archive in enumerate(uploads):
            await asyncio.sleep(max(0.0, began + number * SWAP_PERIOD - time.monotonic()))
            if time.monotonic() >= deadline:
                return number
            await upload(http, "swapped", archive)
        return len(uploads)

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await upload(http, "swapped", make_upload(len(uploads)))
        await stream(client, "swapped", "warm", max_tokens=2)
        bytes_before = server.metric("onebase_adapter_memory_used_bytes")
        assert bytes_before > 0
        began = time.monotonic()
        deadline = began + SWAP_SECONDS
        published, *_ = await asyncio.gather(keep_publishing(http), *(keep_streaming(i) for i in range(CLIENTS)))

    versions = {text.version for text in texts}
    assert published > len(uploads) / 2, "a busy machine may skip some, not most"
    assert len(versions) > published / 4, "the streams saw the versions go by"
    for text in random.Random(0).sample(texts, min(CHECKED, len(texts))):
        await assert_said_by(client, text)

    await stream(client, "swapped", "the last step's figures", max_tokens=2)
    await server.until(lambda: server.metric("onebase_adapter_memory_used_bytes") == bytes_before)
    await server.until(lambda: server.metric("onebase_kv_blocks_used") == 0)


async def test_an_engine_killed_under_load_is_reported_and_comes_back_by_itself(
    server: Server, client: AsyncOpenAI, make_upload: Callable[[int], bytes]
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await upload(http, "character", make_upload(1))
    before = await stream(client, "character", "Once upon a time", max_tokens=30)

    endless = [
        asyncio.create_task(stream(client, model, f"Number {i}", max_tokens=2000))
        for i, model in zip(range(CLIENTS), itertools.cycle(["character", BASE_NAME]), strict=False)
    ]
    await server.until(lambda: server.metric("vllm:num_requests_running") == CLIENTS)
    server.engine.kill()

    for result in await asyncio.gather(*endless, return_exceptions=True):
        assert isinstance(result, openai.APIError), f"a stream ended as if it were whole: {result!r}"
        assert result.code == "engine_unavailable"
    with pytest.raises(openai.APIStatusError) as refusal:
        await stream(client, "character", "Once upon a time", max_tokens=30)
    assert (refusal.value.status_code, refusal.value.code) == (503, "engine_unavailable")
    assert server.status("/ready") == 503
    assert server.status("/health") == 200

    await server.until(lambda: server.status("/ready") == 200)
    assert await stream(client, "character", "Once upon a time", max_tokens=30) == before
    assert server.metric("onebase_engine_restarts_total") == 1
