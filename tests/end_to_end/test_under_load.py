"""What must hold while sixteen clients stream: adapters replaced every 100 ms, and the engine killed."""

import asyncio
import itertools
import os
import random
import signal
import string
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from onebase_server.settings import Settings

from ..server.api.conftest import BASE_NAME, ENGINE, RunningServer, run_server, tiny_base, write_peft

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


@pytest.fixture
def server(tiny_base: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server that no other test shares, with room for a few adapters."""
    paths = {"base": str(tiny_base), "store": tmp_path / "store", "cache_dir": tmp_path / "cache"}
    with run_server(Settings(**paths, **ENGINE | {"kernels": "auto", "max_num_seqs": 32})) as running:
        yield running


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[AsyncOpenAI]:
    """The official client, without retries: a failure shall be seen."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def make_upload(server: RunningServer, tmp_path: Path) -> Callable[[int], bytes]:
    """A zip of the adapter with that number; each is another."""

    def make(number: int) -> bytes:
        directory = write_peft(tmp_path / "peft", server.context.store.layout, seed=number)
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


async def until(server: RunningServer, is_true: Callable[[], bool]) -> None:
    """Wait for something to become true, while this test's streams go on."""
    await asyncio.to_thread(server.wait_until, is_true)


def random_prompt(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters, k=rng.randrange(5, 40)))


async def test_versions_published_every_100_ms_fail_no_stream_and_mix_in_none(
    server: RunningServer, client: AsyncOpenAI, make_upload: Callable[[int], bytes]
) -> None:
    deadline = time.monotonic() + SWAP_SECONDS
    texts: list[Text] = []

    async def keep_streaming(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < deadline:
            texts.append(await stream(client, "swapped", random_prompt(rng), max_tokens=40))

    async def keep_publishing(http: httpx.AsyncClient) -> int:
        for number in itertools.count(2):
            began = time.monotonic()
            if began >= deadline:
                break
            await upload(http, "swapped", await asyncio.to_thread(make_upload, number))
            await asyncio.sleep(max(0.0, SWAP_PERIOD - (time.monotonic() - began)))
        return number - 1

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await upload(http, "swapped", make_upload(1))
        await stream(client, "swapped", "warm", max_tokens=2)
        bytes_before = server.metric("onebase_adapter_memory_used_bytes")
        assert bytes_before > 0
        published, *_ = await asyncio.gather(keep_publishing(http), *(keep_streaming(i) for i in range(CLIENTS)))

    versions = {text.version for text in texts}
    assert published > SWAP_SECONDS / SWAP_PERIOD / 4, "a slow machine may skip some, not most"
    assert len(versions) > published / 4, "the streams saw the versions go by"
    for text in random.Random(0).sample(texts, min(CHECKED, len(texts))):
        await assert_said_by(client, text)

    await stream(client, "swapped", "the last step's figures", max_tokens=2)
    await until(server, lambda: server.metric("onebase_adapter_memory_used_bytes") == bytes_before)
    await until(server, lambda: server.metric("onebase_kv_blocks_used") == 0)


async def test_an_engine_killed_under_load_is_reported_and_comes_back_by_itself(
    server: RunningServer, client: AsyncOpenAI, make_upload: Callable[[int], bytes]
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await upload(http, "character", make_upload(1))
    before = await stream(client, "character", "Once upon a time", max_tokens=30)

    endless = [
        asyncio.create_task(stream(client, model, f"Number {i}", max_tokens=2000))
        for i, model in zip(range(CLIENTS), itertools.cycle(["character", BASE_NAME]), strict=False)
    ]
    await until(server, lambda: server.metric("vllm:num_requests_running", model_name=BASE_NAME) == CLIENTS)
    pid = server.context.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    for result in await asyncio.gather(*endless, return_exceptions=True):
        assert isinstance(result, openai.APIError), f"a stream ended as if it were whole: {result!r}"
        assert result.code == "engine_unavailable"
    with pytest.raises(openai.APIStatusError) as refusal:
        await stream(client, "character", "Once upon a time", max_tokens=30)
    assert (refusal.value.status_code, refusal.value.code) == (503, "engine_unavailable")
    assert server.get("/ready").status_code == 503
    assert server.get("/health").status_code == 200

    await asyncio.to_thread(server.wait_ready)
    assert await stream(client, "character", "Once upon a time", max_tokens=30) == before
    assert server.metric("onebase_engine_restarts_total") == 1
