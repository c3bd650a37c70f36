import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig
from typer.testing import CliRunner

from onebase_server.cli import app
from onebase_server.demo import download_gguf
from onebase_server.errors import ConfigurationError
from onebase_server.model.gguf_config import llama_config
from onebase_server.model.gguf_import import import_gguf
from onebase_server.model.gguf_metadata import GgufMetadata

from .tiny_gguf import HEAD_DIM, HIDDEN, write_gguf

LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TOKENS = torch.tensor([[5, 42, 7, 99, 12, 200, 3]])


def load_gguf_with_transformers(file: Path) -> PreTrainedModel:
    """Transformers' own conversion, its weights rounded to bfloat16 and computed with in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def assert_same_model(imported: Path, expected: PreTrainedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(imported, dtype=torch.float32)
    weights, expected_weights = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_demo_base_is_what_transformers_makes_of_the_same_file(demo_base: Path, tmp_path: Path) -> None:
    assert_same_model(demo_base, load_gguf_with_transformers(download_gguf(tmp_path)))


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_quantisation_gives_transformers_tensors_and_logits(tmp_path: Path, quantization: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", quantization=GGMLQuantizationType[quantization])
    import_gguf(file, tmp_path / "out")
    assert_same_model(tmp_path / "out", load_gguf_with_transformers(file))


def test_tied_head_is_left_out_and_said_to_be_tied(tmp_path: Path) -> None:
    import_gguf(write_gguf(tmp_path / "tiny.gguf", tied=True), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is True


def test_biases_are_imported_and_those_of_q_and_k_unpermuted(tmp_path: Path) -> None:
    bias = np.arange(HIDDEN, dtype=np.float32)
    import_gguf(write_gguf(tmp_path / "tiny.gguf", bias=True, tensors={"blk.0.attn_q.bias": bias}), tmp_path / "out")
    assert read_config(tmp_path / "out")["attention_bias"] is True
    imported = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.bias"]
    evens_then_odds = [*range(0, HEAD_DIM, 2), *range(1, HEAD_DIM, 2)]
    assert imported[:HEAD_DIM].astype(int).tolist() == evens_then_odds


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    import_gguf(file, tmp_path / "whole")
    import_gguf(file, tmp_path / "sharded", shard_bytes=20_000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.name.endswith(f"-of-{len(shards):05}.safetensors") for shard in shards)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    sharded = {name: array for shard in shards for name, array in load_file(shard).items()}
    assert index["weight_map"].keys() == whole.keys() == sharded.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    assert all(np.array_equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {"rope_theta": 10000.0, "rope_type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling_is_carried_over(tmp_path: Path, metadata: dict[str, object], expected: dict[str, object]) -> None:
    import_gguf(write_gguf(tmp_path / "tiny.gguf", metadata=metadata), tmp_path / "out")
    assert read_config(tmp_path / "out")["rope_parameters"] == expected


def config_with_rope_factors(factors: np.ndarray, *, theta: float, head_dim: int) -> dict[str, Any]:
    values = {
        "general.architecture": "llama",
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.block_count": 1,
        "llama.context_length": 131072,
        "llama.embedding_length": 4 * head_dim,
        "llama.feed_forward_length": 64,
        "llama.rope.freq_base": theta,
    }
    return llama_config(
        GgufMetadata(Path("llama3.gguf"), values),
        vocab_size=8,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        rope_factors=factors.astype(np.float32),
    )


@pytest.mark.parametrize("rope", [LLAMA_3_1, {**LLAMA_3_1, "factor": 32.0}], ids=["Llama 3.1", "Llama 3.2"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_scaling_is_recovered_from_the_rope_factors(rope: dict[str, Any], head_dim: int) -> None:
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=head_dim, rope_parameters=rope), "cpu")
    unscaled = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    config = config_with_rope_factors((unscaled / scaled).numpy(), theta=rope["rope_theta"], head_dim=head_dim)
    assert config["rope_parameters"] == rope


@pytest.mark.parametrize("factors", [np.linspace(1, 8, 32), np.ones(32)], ids=["another scaling", "no scaling"])
def test_rope_factors_of_another_kind_are_refused(factors: np.ndarray) -> None:
    with pytest.raises(ConfigurationError, match="not those of Llama 3"):
        config_with_rope_factors(factors, theta=10000.0, head_dim=64)


def test_every_token_that_ends_a_text_is_listed(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 0}
    import_gguf(write_gguf(tmp_path / "tiny.gguf", metadata=metadata), tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [0, 7]}


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "other architecture": ({"architecture": "gemma2"}, "architecture 'gemma2'"),
    "mixture of experts": ({"metadata": {"llama.expert_count": 8}}, "mixture of 8 experts"),
    "unknown rope scaling": ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "scales its rope by 'longrope'"),
    "partial rope": ({"metadata": {"llama.rope.dimension_count": 8}}, "rope.dimension_count is 8"),
    "missing metadata": ({"metadata": {"llama.feed_forward_length": None}}, "'llama.feed_forward_length'"),
    "missing tensor": ({"tensors": {"blk.1.ffn_up.weight": None}}, "no tensor 'blk.1.ffn_up.weight'"),
    "unknown tensor": ({"tensors": {"blk.0.attn_sinks.weight": np.ones(4)}}, "'blk.0.attn_sinks.weight'"),
    "unknown words": ({"pre": "klingon"}, "'klingon'"),
    "unknown tokenizer": ({"tokenizer": "bert"}, "kind 'bert'"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_imported_is_refused_by_name_and_leaves_nothing(tmp_path: Path, refusal: str) -> None:
    changes, message = REFUSALS[refusal]
    write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ConfigurationError, match=message):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert names_in(tmp_path) == {"tiny.gguf"}


def test_tensor_type_that_cannot_be_expanded_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tensors={"blk.0.attn_norm.weight": np.ones(HIDDEN, dtype=np.int8)})
    with pytest.raises(ConfigurationError, match="has the type I8"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert names_in(tmp_path) == {"tiny.gguf"}


@pytest.mark.parametrize("size", [0, 3, 200, 5000])
def test_file_that_is_cut_short_is_refused_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ConfigurationError, match="not a whole GGUF file"):
        import_gguf(file, tmp_path / "out")
    assert names_in(tmp_path) == {"tiny.gguf"}


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.gguf cannot be read: No such file"):
        import_gguf(tmp_path / "missing.gguf", tmp_path / "out")


def test_interrupted_import_leaves_nothing(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(file, tmp_path / "out", on_progress=interrupt)
    assert names_in(tmp_path) == {"tiny.gguf"}


def test_existing_directory_is_kept_unless_forced(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(ConfigurationError, match="pass --force"):
        import_gguf(file, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    import_gguf(file, tmp_path / "out", force=True)
    assert read_config(tmp_path / "out")["model_type"] == "llama"
    assert names_in(tmp_path) == {"tiny.gguf", "out"}


def test_force_does_not_replace_what_is_no_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ConfigurationError, match="no model's directory"):
        import_gguf(file, tmp_path / "photos", force=True)
    assert names_in(tmp_path / "photos") == {"cat.jpg"}


def test_command_converts_and_says_what_is_wrong(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    command = ["import-gguf", str(file), str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert again.stderr.endswith("pass --force to replace it.\n")


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config
