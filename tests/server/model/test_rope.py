"""Rope's frequencies and tables against Transformers' own functions."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from onebase_server.model.config import ModelConfig
from onebase_server.model.rope import RotaryTable, inverse_frequencies

HEAD_DIM = 16
PAIRS = range(HEAD_DIM // 2)
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in PAIRS],
    "long_factor": [2.0 + 0.5 * i for i in PAIRS],
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear, half of a head": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn, all options": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.9, "truncate": False},
    "yarn, three quarters of a head": YARN | {"partial_rotary_factor": 0.75},
    "yarn, two mscales": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, factor from the contexts": YARN | {"factor": None},
    "longrope": LONGROPE,
    "longrope, factor": LONGROPE | {"factor": 8.0},
    "longrope, attention factor": LONGROPE | {"attention_factor": 1.3},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def hf_config(rope: dict[str, Any], max_positions: int = 256) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": 50_000.0, **rope},
    )


@pytest.mark.parametrize("served_context", [40, 256, 1000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, served_context: int) -> None:
    config = hf_config(SCALINGS[name])
    expected, expected_factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](
        config, torch.device("cpu"), seq_len=served_context
    )
    rope = ModelConfig.from_hf(config.to_dict()).rope
    found, factor = inverse_frequencies(rope, HEAD_DIM, served_context)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


def test_cosines_and_sines_of_a_position_are_those_of_transformers() -> None:
    config = hf_config({"rope_type": "default"})
    positions = torch.tensor([0, 1, 77, 255])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0))
    table = RotaryTable.build(ModelConfig.from_hf(config.to_dict()).rope, HEAD_DIM, 256, torch.device("cpu"))
    found_cos, found_sin = table.cos[positions], table.sin[positions]
    assert torch.equal(torch.cat([found_cos, found_cos], dim=-1), cos[0])
    assert torch.equal(torch.cat([found_sin, found_sin], dim=-1), sin[0])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_what_depends_on_the_length_depends_on_the_served_context_only(name: str) -> None:
    rope = ModelConfig.from_hf(hf_config(SCALINGS[name], max_positions=64).to_dict()).rope
    short, _ = inverse_frequencies(rope, HEAD_DIM, served_context=64)
    long, _ = inverse_frequencies(rope, HEAD_DIM, served_context=65)
    assert not torch.equal(short, long)
