"""Adapters that are virtual tokens: what PEFT writes becomes rows; what does not fit is named and refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from onebase_adapters.adapter import PrefixKV, VirtualTokens
from onebase_adapters.blobs import read_blob
from onebase_adapters.errors import InvalidConfig, InvalidTensors, InvalidUpload, UnsupportedAdapter
from onebase_adapters.peft_format import parse


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_row_of_prefix_tuning_is_keys_then_values_layer_by_layer(write_prefix, layout, dtype, peft_type):
    rows = np.arange(5 * 2 * 3 * 16).reshape(5, -1).astype(dtype)
    shape = {"num_layers": 3, "token_dim": 16, "num_attention_heads": 2}
    adapter = parse(write_prefix(rows, peft_type=peft_type, **shape), layout, max_rank=64)
    assert isinstance(adapter.prefix, PrefixKV)
    assert (adapter.prefix.rows.shape, adapter.prefix.rows.dtype) == ((5, 3, 2, 16), dtype)
    np.testing.assert_array_equal(adapter.prefix.rows[2, 1, 0], rows[2, 2 * 16 : 3 * 16])
    np.testing.assert_array_equal(adapter.prefix.rows[2, 1, 1], rows[2, 3 * 16 : 4 * 16])


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING"])
def test_virtual_tokens_are_rows_as_wide_as_the_model(write_prefix, layout, peft_type):
    rows = np.ones((5, 32), np.float32)
    adapter = parse(write_prefix(rows, peft_type=peft_type, token_dim=32), layout, max_rank=64)
    assert isinstance(adapter.prefix, VirtualTokens)
    np.testing.assert_array_equal(adapter.prefix.rows, rows)


def test_a_published_prefix_says_its_tokens_instead_of_ranks_and_is_read_back_bit_identical(store, write_prefix):
    rows = np.random.default_rng(1).standard_normal((5, 2 * 3 * 16)).astype(np.float16)
    version = store.publish("prefixed", write_prefix(rows))
    assert version == store.resolve("prefixed")
    assert (version.num_virtual_tokens, version.rank, version.targets) == (5, 0, ())
    assert (version.num_parameters, version.nbytes) == (rows.size, rows.nbytes)
    read = read_blob(store.blob_path(version.digest))
    assert isinstance(read.prefix, PrefixKV)
    assert not read.pairs
    assert read.prefix.rows.tobytes() == rows.tobytes()


WIDE = np.ones((5, 2 * 3 * 32), np.float32)

REFUSALS = {
    "no tokens": ({"num_virtual_tokens": 0}, InvalidConfig, "num_virtual_tokens should be a positive integer, not 0"),
    "encoder and decoder": (
        {"num_transformer_submodules": 2},
        InvalidConfig,
        "num_transformer_submodules is 2, but for this base it has to be 1",
    ),
    "other depth": ({"num_layers": 4}, InvalidConfig, "num_layers is 4, but for this base it has to be 3"),
    "other heads": ({"num_attention_heads": 4}, InvalidConfig, "num_attention_heads is 4, .* has to be 2"),
    "heads not grouped": ({"token_dim": 32, "rows": WIDE}, InvalidConfig, "token_dim is 32.* has to be 16"),
    "other width": ({"rows": WIDE}, InvalidTensors, r"prompt_embeddings has shape \[5, 192\].*\[5, 96\]"),
    "other length": ({"num_virtual_tokens": 6}, InvalidTensors, r"prompt_embeddings has shape \[5, 96\].*\[6, 96\]"),
    "NaN": ({"rows": np.full((5, 96), np.nan, np.float32)}, InvalidTensors, "prompt_embeddings holds NaN"),
    "integers": ({"rows": np.ones((5, 96), np.int8)}, InvalidTensors, "prompt_embeddings is I8"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, UnsupportedAdapter, "modules_to_save"),
    "an option of tomorrow": ({"an_option_of_tomorrow": 0}, UnsupportedAdapter, "an_option_of_tomorrow"),
    "a kind of several tasks": ({"peft_type": "MULTITASK_PROMPT_TUNING"}, UnsupportedAdapter, "'MULTITASK_PROMPT_TUN"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_prefix_is_named_and_leaves_nothing_behind(case, store, write_prefix):
    config, error, message = REFUSALS[case]
    with pytest.raises(error, match=message) as caught:
        store.publish("prefixed", write_prefix(**config))
    assert isinstance(caught.value, InvalidUpload)
    assert str(caught.value).endswith(".")
    assert store.list_adapters() == []
    assert not list((store.root / "staging").iterdir())
    assert store.verify().is_clean


def test_other_tensors_beside_the_prefix_are_refused(store, write_prefix):
    directory = write_prefix()
    tensors = {"prompt_embeddings": np.ones((5, 96), np.float32), "base_model.lm_head.weight": np.ones(2, np.float32)}
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(InvalidTensors, match=r"should be prompt_embeddings; there are: base_model\.lm_head\.weight, "):
        store.publish("prefixed", directory)


@pytest.mark.parametrize("name", ["PrefixTuningConfig", "CartridgeConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_every_option_that_peft_writes_is_either_carried_or_refused_on_purpose(name, write_prefix, layout, tmp_path):
    """A default configuration passes, whatever version of PEFT is installed."""
    peft = pytest.importorskip("peft")
    getattr(peft, name)(num_virtual_tokens=5, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    rows = np.ones((5, 32), np.float32) if "Prompt" in name else None
    assert parse(write_prefix(rows, **config), layout, max_rank=64).num_virtual_tokens == 5
