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
def test_another_kind_is_written_as_it_came_and_merged(onebase, base, tmp_path):
    source = tmp_path / "ia3"
    source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["o_proj"]}))
    tensors = {"base_model.model.model.layers.0.self_attn.o_proj.ia3_l": np.full((32, 1), 2, np.float32)}
    save_file(tensors, source / "adapter_model.safetensors")
    onebase("publish", "ia3", source, "--base", base)
    onebase("export", "ia3", tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all((written[name] == tensors[name]).all() for name in tensors)
    shown = onebase("export", "ia3", tmp_path / "merged", "--merged", "--base", base).stdout
    assert "model.layers.0.self_attn.o_proj" in shown


@pytest.mark.usefixtures("published")
def test_an_alora_is_written_as_it_came_but_merged_into_no_weights(onebase, base, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": [5, 7]}))
    onebase("publish", "alora", adapter, "--base", base)
    onebase("export", "alora", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["alora_invocation_tokens"] == [5, 7]
    refused = onebase("export", "alora", tmp_path / "merged", "--merged", "--base", base, exit_code=1)
    assert "aLoRA" in refused.stderr
    assert not (tmp_path / "merged").exists()


def test_on_a_base_whose_checkpoint_is_fused_an_adapter_names_the_fused_linears(onebase, base, adapter, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    source = load_file(adapter / "adapter_model.safetensors")
    query = {name.replace("o_proj", "q_proj"): tensor for name, tensor in source.items()}
    save_file(query, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    onebase("publish", "pirate", adapter, "--base", base)
    onebase("export", "pirate", tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.qkv_proj"
    assert written.keys() == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    np.testing.assert_array_equal(written[f"{module}.lora_B.weight"], [[1] * 4] * 32 + [[0] * 4] * 32)


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
    assert "virtual tokens, which cannot be merged" in refused.stderr
    assert not (tmp_path / "merged").exists()
