"""Prefix-tuning and prompt tuning over HTTP: uploaded, answering as PEFT does, replaced, rolled back and removed."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import AsyncOpenAI
from peft import PeftModel, PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from safetensors.numpy import load_file, save
from transformers import AutoModelForCausalLM

from .conftest import LETTERS, RunningServer

PROMPT = "Who goes there?"
FILES = ("adapter_config.json", "adapter_model.safetensors")
KINDS: dict[str, Callable[[], PromptLearningConfig]] = {
    "prefix-tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=21),
    "prompt-tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.fixture
def make_prefix(tiny_base: Path, tmp_path: Path) -> Callable[..., tuple[PeftModel, dict[str, bytes]]]:
    """An adapter of a kind that PEFT made, and the files that it saved of it."""

    def make(kind: str, *, seed: int = 0) -> tuple[PeftModel, dict[str, bytes]]:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = get_peft_model(base, KINDS[kind]())
        model.save_pretrained(tmp_path)
        return model.eval(), {name: (tmp_path / name).read_bytes() for name in FILES}

    return make


def upload(server: RunningServer, name: str, files: dict[str, bytes]) -> httpx.Response:
    return server.post("/v1/adapters", data={"name": name}, files=files)


async def answer(openai: AsyncOpenAI, model: str) -> Any:
    return await openai.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )


@torch.inference_mode()
def answer_of(model: PeftModel) -> str:
    """What Transformers and PEFT say to PROMPT: tokens are single characters."""
    token_ids = [LETTERS.index(letter) for letter in PROMPT]
    for _ in range(12):
        token_ids.append(int(model(input_ids=torch.tensor([token_ids])).logits[0, -1].argmax()))
    return "".join(LETTERS[token] for token in token_ids[len(PROMPT) :])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_prefix_answers_as_peft_does_from_its_upload_until_it_is_removed(
    kind: str,
    server: RunningServer,
    openai: AsyncOpenAI,
    make_prefix: Callable[..., tuple[PeftModel, dict[str, bytes]]],
) -> None:
    (first, first_files), (second, second_files) = (make_prefix(kind, seed=seed) for seed in (1, 2))
    num_virtual_tokens = KINDS[kind]().num_virtual_tokens

    card = upload(server, kind, first_files).json()
    assert (card["version"], card["num_virtual_tokens"], card["rank"], card["targets"]) == (
        1,
        num_virtual_tokens,
        0,
        [],
    )
    response = await answer(openai, kind)
    assert response.choices[0].text == answer_of(first) != (await answer(openai, "tiny")).choices[0].text
    assert response.usage.prompt_tokens == len(PROMPT), "virtual tokens are not the client's"

    arguments = {"model": kind, "prompt": PROMPT, "max_tokens": 300, "temperature": 0}
    stream = await openai.completions.create(**arguments, extra_body={"ignore_eos": True}, stream=True)
    text = (await anext(stream)).choices[0].text
    assert (await asyncio.to_thread(upload, server, kind, second_files)).json()["version"] == 2
    assert (await answer(openai, kind)).choices[0].text == answer_of(second)
    text += "".join([chunk.choices[0].text async for chunk in stream])
    assert text.startswith(answer_of(first)), "who has begun keeps the version"

    assert (await answer(openai, f"{kind}@1")).choices[0].text == answer_of(first)
    server.post(f"/v1/adapters/{kind}/rollback")
    assert (await answer(openai, kind)).choices[0].text == answer_of(first)
    assert server.delete(f"/v1/adapters/{kind}").json()["deleted"] is True
    assert server.post("/v1/completions", json={"model": kind, "prompt": PROMPT}).status_code == 404


async def test_virtual_tokens_take_their_part_of_the_context(
    server: RunningServer, openai: AsyncOpenAI, make_prefix: Callable[..., tuple[PeftModel, dict[str, bytes]]]
) -> None:
    upload(server, "narrow", make_prefix("prefix-tuning")[1])
    assert server.get("/v1/models/tiny").json()["max_model_len"] == 2048
    assert server.get("/v1/models/narrow").json()["max_model_len"] == 2048 - 21
    for prompt, max_tokens in (("x" * 2000, 28), ("x" * 2028, None)):
        response = server.post("/v1/completions", json={"model": "narrow", "prompt": prompt, "max_tokens": max_tokens})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "context of 2048 tokens, 21 of which are the adapter's virtual tokens, holds" in error["message"]
    fits = server.post("/v1/completions", json={"model": "narrow", "prompt": "x" * 2026, "max_tokens": 1})
    assert fits.json()["usage"]["total_tokens"] == 2048 - 21
    server.delete("/v1/adapters/narrow")


def altered(files: dict[str, bytes], **config: Any) -> dict[str, bytes]:
    return files | {FILES[0]: json.dumps(json.loads(files[FILES[0]]) | config).encode()}


@pytest.mark.parametrize("field", ["num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"])
def test_a_prefix_for_another_base_is_refused_by_its_field_and_nothing_is_kept(
    field: str, server: RunningServer, make_prefix: Callable[..., tuple[PeftModel, dict[str, bytes]]]
) -> None:
    response = upload(server, "unfit", altered(make_prefix("prefix-tuning")[1], **{field: 7}))
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_adapter_config")
    assert f"{field} is 7, but for this base it has to be" in response.json()["error"]["message"]
    assert server.get("/v1/adapters/unfit").status_code == 404
    assert not list((server.context.store.root / "staging").iterdir())


def test_a_prefix_as_long_as_the_context_is_refused(
    server: RunningServer, tmp_path: Path, make_prefix: Callable[..., tuple[PeftModel, dict[str, bytes]]]
) -> None:
    files = altered(make_prefix("prefix-tuning")[1], num_virtual_tokens=2048)
    width = load_file(tmp_path / FILES[1])["prompt_embeddings"].shape[1]
    files[FILES[1]] = save({"prompt_embeddings": np.zeros((2048, width), np.float32)})
    response = upload(server, "endless", files)
    assert (response.status_code, response.json()["error"]["code"]) == (507, "adapter_does_not_fit")
    assert server.get("/v1/adapters/endless").status_code == 404
