"""What is written as a PEFT directory is what is read, here and by PEFT."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from onebase_adapters.adapter import Adapter, LowRankPair, ModuleKey, PrefixKV, VirtualTokens
from onebase_adapters.peft_format import parse
from onebase_adapters.peft_writer import write_peft

from .conftest import LAYOUT


def pair(projection: str, rank: int, scale: float, dtype: np.dtype | type = np.float32) -> LowRankPair:
    rng = np.random.default_rng(rank)
    rows, columns = LAYOUT.shapes[projection]
    lora_a, lora_b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
    return LowRankPair(lora_a.astype(dtype), lora_b.astype(dtype), scale)


@pytest.fixture
def adapter() -> Adapter:
    """Pairs that agree neither in rank nor in scale nor in dtype."""
    return Adapter(
        {
            ModuleKey(0, "q_proj"): pair("q_proj", 4, 2.0),
            ModuleKey(1, "q_proj"): pair("q_proj", 4, 2.0),
            ModuleKey(2, "q_proj"): pair("q_proj", 6, 1.0),
            ModuleKey(2, "down_proj"): pair("down_proj", 4, 0.25, ml_dtypes.bfloat16),
        }
    )


@pytest.fixture
def directory(adapter: Adapter, tmp_path: Path) -> Path:
    write_peft(adapter, tmp_path, base_name="tiny")
    return tmp_path


def test_an_adapter_survives_being_written_and_read(adapter, directory):
    read = parse(directory, LAYOUT, max_rank=8)
    assert read.pairs.keys() == adapter.pairs.keys()
    for key, expected in adapter.pairs.items():
        assert read.pairs[key].scale == expected.scale
        assert read.pairs[key].lora_a.dtype == expected.lora_a.dtype
        np.testing.assert_array_equal(read.pairs[key].lora_a, expected.lora_a)
        np.testing.assert_array_equal(read.pairs[key].lora_b, expected.lora_b)


@pytest.fixture
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYOUT.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def test_peft_loads_it(adapter, directory, base, recwarn):
    model = PeftModel.from_pretrained(base, directory)
    assert not [warning for warning in recwarn if "adapter keys" in str(warning.message)]
    for key, expected in adapter.pairs.items():
        parent = "mlp" if key.projection == "down_proj" else "self_attn"
        module = model.get_submodule(f"base_model.model.model.layers.{key.layer}.{parent}.{key.projection}")
        ours = expected.scale * expected.lora_b.astype(np.float32) @ expected.lora_a.astype(np.float32)
        np.testing.assert_allclose(module.get_delta_weight("default").detach(), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [PrefixKV, VirtualTokens])
def test_virtual_tokens_survive_too_and_peft_loads_them(kind, base, tmp_path):
    shape = (5, LAYOUT.num_layers, 2, 16) if kind is PrefixKV else (5, 32)
    prefix = kind(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    write_peft(Adapter({}, prefix=prefix), tmp_path, base_name="tiny")
    read = parse(tmp_path, LAYOUT, max_rank=8).prefix
    assert type(read) is kind
    np.testing.assert_array_equal(read.rows, prefix.rows)
    prompt = PeftModel.from_pretrained(base, tmp_path).get_prompt(batch_size=1)
    if kind is VirtualTokens:
        np.testing.assert_array_equal(prompt[0].detach(), prefix.rows)
    else:  # [batch, heads, tokens, head size]
        keys = prompt.layers[1].keys[0].transpose(0, 1).flatten(1)
        np.testing.assert_array_equal(keys.detach(), prefix.rows[:, 1, 0])
