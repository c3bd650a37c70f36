"""A tiny base, an adapter of it, and `onebase adapters` on a store of the test's own."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from onebase_server.cli import app

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-llama"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return directory


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "peft"
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.o_proj"
    lora = {"A": np.ones((4, 32), np.float32), "B": np.ones((32, 4), np.float32)}
    save_file(
        {f"{module}.lora_{side}.weight": matrix for side, matrix in lora.items()},
        directory / "adapter_model.safetensors",
    )
    return directory


@pytest.fixture
def onebase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `onebase adapters …` on this test's store."""
    monkeypatch.setenv("ONEBASE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object, exit_code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["adapters", *map(str, arguments)])
        assert result.exit_code == exit_code, result.output
        return result

    return run
