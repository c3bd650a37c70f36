"""OpenAI's client chats with the base and the three demo characters at once, streaming, through the whole server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from onebase_server.settings import Settings

from ..server.api.conftest import RunningServer, run_server

pytestmark = pytest.mark.demo

DEMO = Path(__file__).parents[2] / "adapters_store" / "demo"
CHARACTERS = ("pirate", "shakespeare", "extractor")
FILES = ("adapter_config.json", "adapter_model.safetensors")
QUESTION = "On 3 May Anna paid $30 in Rome. What do you say to that?"


@pytest.fixture
def server(demo_base: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """The demo base with the three characters, uploaded as anyone would."""
    with run_server(Settings(base=str(demo_base), store=tmp_path / "store", device="cpu", threads=1)) as running:
        for name in CHARACTERS:
            files = {file: (file, (DEMO / name / file).read_bytes()) for file in FILES}
            response = running.post("/v1/adapters", data={"name": name}, files=files)
            assert response.status_code == 201, response.text
        yield running


async def test_the_base_and_all_characters_answer_at_once_each_in_its_own_way(server: RunningServer) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        models = [model.id async for model in client.models.list()]
        assert set(models[1:]) == set(CHARACTERS)
        began, ended = {}, {}

        async def chat(model: str) -> str:
            text = ""
            async for chunk in await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": QUESTION}],
                temperature=0,
                max_completion_tokens=24,
                stream=True,
            ):
                text += chunk.choices[0].delta.content or ""
                began.setdefault(model, asyncio.get_running_loop().time())
            ended[model] = asyncio.get_running_loop().time()
            return text

        texts = await asyncio.gather(*map(chat, models))
    assert max(began.values()) < min(ended.values()), "they took turns"
    assert all(texts)
    assert len(set(texts)) == len(models), f"two of them said the same: {texts}"
    assert texts[models.index("extractor")].startswith('{"name": "Anna"')
