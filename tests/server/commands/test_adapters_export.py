"""`onebase adapters export`; what is written is tested in tests/server/model/test_merged_checkpoint.py."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onebase_server.model.config import ModelConfig
from onebase_server.model.names import all_shapes


@pytest.fixture
def published(onebase, base, adapter):
    """The store with pirate, and a base that has weights."""
    shapes = all_shapes(ModelConfig.from_directory(base))
    rng = np.random.default_rng(0)
    save_file(
        {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}, base / "model.safetensors"
    )
    onebase("publish", "pirate", adapter, "--base", base)


@pytest.mark.usefixtures("published")
def test_an_adapter_is_written_as_it_came(onebase, adapter, tmp_path):
    onebase("export", "pirate@1", tmp_path / "out")
    ours, original = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out", adapter))
    assert ours.keys() == original.keys()
    assert all(np.array_equal(ours[name], original[name]) for name in ours)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("quantization", "magnitude"), [("none", "e-03"), ("nf4", "e-02")])
def test_a_merged_export_prints_the_error_of_rounding(onebase, base, tmp_path, quantization, magnitude):
    shown = onebase("export", "pirate", tmp_path / "out", "--merged", "--base", base, "--quantization", quantization)
    for label in ("all 1", "model.layers.0.self_attn.o_proj"):
        (row,) = (line for line in shown.stdout.splitlines() if label in line)
        assert magnitude in row
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in written) == (quantization == "nf4")


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("options", [(), ("--merged",)], ids=["as PEFT's", "merged"])
def test_an_adapter_that_is_more_than_an_update_is_refused(onebase, base, tmp_path, options):
    source = tmp_path / "ia3"
    source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["o_proj"]}))
    width, _ = ModelConfig.from_directory(base).adapter_layout().shapes["o_proj"]
    vector = np.ones((width, 1), np.float32)
    save_file({"base_model.model.model.layers.0.self_attn.o_proj.ia3_l": vector}, source / "adapter_model.safetensors")
    onebase("publish", "ia3", source, "--base", base)
    refused = onebase("export", "ia3", tmp_path / "out", *options, "--base", base, exit_code=1)
    assert "does more to layers.0.o_proj" in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("published")
def test_an_export_that_cannot_be_is_one_sentence(onebase, base, adapter, tmp_path):
    assert "no adapter parrot" in onebase("export", "parrot", tmp_path / "out", exit_code=1).stderr
    assert "already exists" in onebase("export", "pirate", adapter, exit_code=1).stderr
    assert "needs the base" in onebase("export", "pirate", tmp_path / "out", "--merged", exit_code=1).stderr
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    refused = onebase("export", "pirate", tmp_path / "out", "--merged", "--base", base, exit_code=1)
    assert "another model" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_virtual_tokens_are_listed_and_written_but_merged_into_no_weights(onebase, base, tmp_path):
    directory = tmp_path / "prefix"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}')
    rows = np.ones((5, 2 * 2 * 16), np.float32)
    save_file({"prompt_embeddings": rows}, directory / "adapter_model.safetensors")
    assert "5 virtual tokens" in onebase("publish", "prefixed", directory, "--base", base).stdout
    onebase("export", "prefixed", tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"], rows)
    refused = onebase("export", "prefixed", tmp_path / "merged", "--merged", "--base", base, exit_code=1)
    assert "prefixed is virtual tokens" in refused.stderr
    assert not (tmp_path / "merged").exists()
