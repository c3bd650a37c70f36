import json
import shutil
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


def test_publishing_to_a_new_store_needs_the_base_once(onebase, base, adapter):
    assert "no base was given" in onebase("publish", "pirate", adapter, exit_code=1).stderr
    assert "o_proj" in onebase("publish", "pirate", adapter, "--base", base).stdout
    assert " 2 " in onebase("publish", "pirate", adapter).stdout
    listing = onebase("list").stdout
    assert "Adapters of tiny-llama" in listing
    assert "pirate" in listing


def test_an_archive_is_published_like_a_directory(onebase, base, adapter, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "upload"), "gztar", adapter)
    onebase("publish", "pirate", archive, "--base", base)
    assert "pirate" in onebase("list").stdout
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_versions_are_shown_rolled_back_and_removed(onebase, base, adapter):
    onebase("publish", "pirate", adapter, "--base", base)
    onebase("publish", "pirate", adapter)
    assert "Live now" in onebase("rollback", "pirate").stdout
    shown = onebase("show", "pirate").stdout.splitlines()
    assert [("yes" in line) for line in shown if "o_proj" in line] == [True, False]
    assert "no version 9" in onebase("rollback", "pirate", "--version", 9, exit_code=1).stderr
    onebase("remove", "pirate")
    assert "no adapter pirate" in onebase("show", "pirate", exit_code=1).stderr


def test_verify_fails_until_it_has_repaired(onebase, base, adapter, tmp_path):
    onebase("publish", "pirate", adapter, "--base", base)
    assert "Everything is as it should be" in onebase("verify").stdout
    blob = next((tmp_path / "store" / "blobs").iterdir())
    blob.rename(blob.with_name("stray.safetensors"))
    broken = onebase("verify", exit_code=1).stdout
    assert "pirate@1: its blob" in broken
    assert "stray.safetensors belongs to no version" in broken
    assert "no whole version is left" in onebase("verify", "--repair").stdout
    assert "Everything is as it should be" in onebase("verify").stdout


def test_a_refusal_is_one_sentence_and_exit_status_1(onebase, base, adapter):
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    error = onebase("publish", "pirate", adapter, "--base", base, exit_code=1).stderr
    assert "has shape [4, 32], but this base and adapter_config.json make it [8, 32]." in error
    assert "Traceback" not in error


def test_a_base_without_a_config_is_refused(onebase, adapter, tmp_path):
    assert "no config.json" in onebase("publish", "pirate", adapter, "--base", tmp_path, exit_code=1).stderr
