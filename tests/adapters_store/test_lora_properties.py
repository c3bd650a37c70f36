"""Whatever a LoRA configuration says, the canonical form has what PEFT computes with, and survives being exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from onebase_adapters.adapter import Adapter, Epilogue, LowRankPair, ModuleKey
from onebase_adapters.base_layout import BaseLayout
from onebase_adapters.fused_projections import fuse_projections
from onebase_adapters.peft_format import parse
from onebase_adapters.peft_writer import write_peft

from ..lora_configs import adapted, lora_options
from .conftest import LAYOUT
from .test_peft_round_trip import assert_same, update

TWO_LAYERS = BaseLayout(num_layers=2, shapes=LAYOUT.shapes)


@contextmanager
def saved_by_peft(options: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[PeftModel, Path]]:
    """A model with an adapter of random numbers in that dtype, and the directory that it is saved in."""
    model = adapted(LoraConfig(**options))
    assume(model is not None)
    assert model is not None
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
            parameter.data = parameter.data.to(dtype)
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        yield model, Path(directory)


def linears(model: PeftModel) -> Iterator[tuple[ModuleKey, torch.nn.Module]]:
    """The layers' linears, PEFT's in place of those that it adapts."""
    for name, module in model.base_model.model.named_modules():
        match name.split("."):
            case ["model", "layers", layer, _, projection] if projection in LAYOUT.shapes:
                yield ModuleKey(int(layer), projection), module


def vectors_of(module: torch.nn.Module, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What PEFT does to a linear's outputs beside the update, by the names of `Epilogue`."""
    is_adapted = isinstance(module, LoraLayer)
    linear = module.get_base_layer() if is_adapted else module
    vectors = {}
    if linear.bias is not None and (options["bias"] == "all" or (options["bias"] == "lora_only" and is_adapted)):
        vectors["bias"] = linear.bias
    if is_adapted and options.get("use_dora"):
        vectors["magnitude"] = module.lora_magnitude_vector["default"].weight
    if is_adapted and options.get("lora_bias"):
        vectors["shift"] = module.lora_B["default"].bias.float() * module.scaling["default"]
    return vectors


def as_numpy(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().float().numpy()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lora_options(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_canonical_form_is_what_peft_computes_with(options: dict[str, Any], dtype: torch.dtype) -> None:
    with saved_by_peft(options, dtype) as (model, directory):
        adapter = parse(directory, TWO_LAYERS, max_rank=8)
        for key, module in linears(model):
            assert (key in adapter.pairs) == isinstance(module, LoraLayer)
            if pair := adapter.pairs.get(key):
                assert {str(pair.lora_a.dtype), str(pair.lora_b.dtype)} == {str(dtype).removeprefix("torch.")}
                np.testing.assert_array_equal(pair.lora_a.astype(np.float32), as_numpy(module.lora_A["default"].weight))
                np.testing.assert_array_equal(pair.lora_b.astype(np.float32), as_numpy(module.lora_B["default"].weight))
                assert pair.scale == pytest.approx(module.scaling["default"], rel=1e-15)
            vectors, expected = adapter.epilogues.get(key, Epilogue()).vectors, vectors_of(module, options)
            assert vectors.keys() == expected.keys()
            for name, vector in vectors.items():  # a shift is a product
                tolerance = 1e-6 if name == "shift" else 0
                np.testing.assert_allclose(vector.astype(np.float32), as_numpy(expected[name]), rtol=tolerance)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lora_options(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_an_adapter_that_was_exported_is_the_same_adapter(options: dict[str, Any], dtype: torch.dtype) -> None:
    with saved_by_peft(options, dtype) as (_, directory), TemporaryDirectory() as exported:
        adapter = parse(directory, TWO_LAYERS, max_rank=8)
        write_peft(adapter, Path(exported), base_name="tiny")
        assert_same(parse(Path(exported), TWO_LAYERS, max_rank=8), adapter)


@st.composite
def qkv_pairs(draw: st.DrawFn) -> dict[ModuleKey, LowRankPair]:
    """Pairs of some of q, k and v; those of one seed and rank share A."""
    pairs = {}
    for projection in draw(st.sets(st.sampled_from(["q_proj", "k_proj", "v_proj"]), min_size=1)):
        rows, columns = LAYOUT.shapes[projection]
        rng, rank = np.random.default_rng(draw(st.integers(0, 1))), draw(st.integers(1, 3))
        dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
        lora_a, lora_b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
        scale = draw(st.sampled_from([0.5, 0.7]))
        pairs[ModuleKey(0, projection)] = LowRankPair(lora_a.astype(dtype), lora_b.astype(dtype), scale)
    return pairs


@settings(max_examples=100, deadline=None, derandomize=True)
@given(qkv_pairs())
def test_pairs_of_a_fused_linear_are_exported_and_read_with_the_same_updates(
    pairs: dict[ModuleKey, LowRankPair],
) -> None:
    whole = fuse_projections(Adapter(pairs), LAYOUT)
    assert whole.rank <= sum(pair.rank for pair in pairs.values())
    with TemporaryDirectory() as directory:
        write_peft(whole, Path(directory), base_name="fused")
        read = parse(Path(directory), LAYOUT, max_rank=9)
        for projection in ("q_proj", "k_proj", "v_proj"):
            key = ModuleKey(0, projection)
            expected = update(pairs[key]) if key in pairs else 0
            np.testing.assert_allclose(update(read.pairs[key]), expected, rtol=1e-5, atol=1e-5)
