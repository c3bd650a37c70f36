"""An adapter with tokens of its own over HTTP: uploaded, prompted with them, and answering with them."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from .conftest import RunningServer

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def files(tiny_base: Path, tmp_path: Path) -> dict[str, bytes]:
    """Those of an adapter with two more tokens than the base, of which the last is likeliest behind 1 and itself."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 2)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([[1, model.config.vocab_size - 1]])).last_hidden_state[0, -1]
        model.lm_head.weight[-1] = 9 * hidden * model.lm_head.weight.norm(dim=1).max() / hidden.norm()
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    return {name: (tmp_path / name).read_bytes() for name in FILES}


def test_tokens_that_an_adapter_adds_are_taken_and_sampled_under_it_alone(
    server: RunningServer, files: dict[str, bytes]
) -> None:
    uploaded = server.post("/v1/adapters", data={"name": "larger"}, files=files)
    assert uploaded.status_code == 201, uploaded.text
    size = uploaded.json()["vocab_size"]
    assert size == server.context.engine_info.vocab_size + 2
    assert "embed_tokens" in uploaded.json()["targets"]

    def complete(model: str, token: int, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": [1, token], "max_tokens": 5, "temperature": 0, **fields}
        return server.post("/v1/completions", json=body)

    answer = complete("larger", size - 1, stop_token_ids=[size - 1])
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["usage"]["completion_tokens"] == 1
    beyond = complete("larger", size)
    assert beyond.status_code == 400
    assert f"from 0 to {size - 1}" in beyond.json()["error"]["message"]
    base = complete(server.context.settings.served_name, size - 1)
    assert base.status_code == 400
    assert f"from 0 to {size - 3}" in base.json()["error"]["message"]
