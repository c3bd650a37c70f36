"""A packed adapter, run through the side-path op, is the adapter's own formula."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import onebase_kernels as kernels
from onebase_adapters.adapter import Adapter, Epilogue, LowRankPair, ModuleKey
from onebase_kernels import LoraBatch, Segment
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.packing import pack_adapter
from onebase_server.model.config import ModelConfig

from .conftest import TINY, dense_base, random_adapter

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "ranks",
    [
        {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 4},
        {"v_proj": 3, "q_proj": 1, "down_proj": 7},
        {"up_proj": 2},
    ],
    ids=["all linears", "some, mixed ranks", "one slice of a group"],
)
def test_the_packed_form_computes_what_the_pairs_say(
    tiny_config: ModelConfig, ranks: dict[str, int], dtype: type
) -> None:
    adapter = random_adapter(tiny_config, ranks, dtype=dtype)
    packed = pack_adapter(adapter, tiny_config, MatrixFormat(torch.float32), base=())
    x = torch.randn(5, 48)
    for layer in range(tiny_config.num_layers):
        for index, group in enumerate(tiny_config.projection_groups):
            inputs = x[:, : group.in_features]
            y = torch.zeros(5, sum(group.widths))
            lora = LoraBatch(packed.numbers, packed.table[layer, index].view(1, 1, -1), (Segment(0, 0, 5),))
            kernels.add_lora_(y, inputs, lora, 0, group.widths)
            expected = []
            for projection, width in zip(group.projections, group.widths, strict=True):
                pair = adapter.pairs.get(ModuleKey(layer, projection))
                if pair is None:
                    expected.append(np.zeros((5, width), dtype=np.float32))
                else:
                    a, b = pair.lora_a.astype(np.float32), pair.lora_b.astype(np.float32)
                    expected.append(pair.scale * inputs.numpy() @ a.T @ b.T)
            np.testing.assert_allclose(y.numpy(), np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-4)


def test_an_adapter_takes_just_the_numbers_it_has(tiny_config: ModelConfig) -> None:
    adapter = random_adapter(tiny_config, {"q_proj": 5, "down_proj": 2})
    assert (
        pack_adapter(adapter, tiny_config, MatrixFormat(torch.bfloat16), base=()).numbers.numel()
        == adapter.num_parameters
    )


vectors = st.fixed_dictionaries({}, optional={name: st.just(name) for name in ("magnitude", "factor", "bias", "shift")})


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.dictionaries(st.sampled_from(LINEARS), st.integers(1, 9)),
    epilogues=st.dictionaries(st.sampled_from(LINEARS), vectors.filter(bool)),
    has_bias=st.booleans(),
)
def test_a_packed_epilogue_computes_what_the_canonical_form_says(
    ranks: dict[str, int], epilogues: dict[str, dict[str, str]], has_bias: bool
) -> None:
    """Whatever linears have an update, an epilogue, both or neither: y is the formula on the base's weights."""
    config = ModelConfig.from_hf(TINY)
    pairs = random_adapter(config, ranks).pairs
    shapes = config.adapter_layout().shapes
    rng = np.random.default_rng(3)
    adapter = Adapter(
        pairs,
        {
            ModuleKey(1, name): Epilogue(**{part: rng.standard_normal(shapes[name][0], "f4") for part in parts})
            for name, parts in epilogues.items()
        },
    )
    base = dense_base(config, has_bias=has_bias)
    packed = pack_adapter(adapter, config, MatrixFormat(torch.float32), base)
    x = torch.randn(5, 48)
    for index, group in enumerate(config.projection_groups):
        place, inputs = len(config.projection_groups) + index, x[:, : group.in_features]
        y = base[place](inputs, LoraBatch(packed.numbers, packed.table.flatten(0, 1).unsqueeze(1), (Segment(0, 0, 5),)))
        for i, part in enumerate(y.split(list(group.widths), dim=1)):
            key = ModuleKey(1, group.projections[i])
            weight = base[place].weight(i)
            bias = base[place].bias.split(list(group.widths))[i] if has_bias else torch.zeros(group.widths[i])
            expected = formula(inputs, weight, bias, adapter.pairs.get(key), adapter.epilogues.get(key, Epilogue()))
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-3)


def formula(x: Tensor, weight: Tensor, bias: Tensor, pair: LowRankPair | None, epilogue: Epilogue) -> Tensor:
    """As the docstring of `Epilogue` has it."""
    given = {name: torch.from_numpy(vector) for name, vector in epilogue.vectors.items()}
    if pair is not None:
        weight = weight + pair.scale * torch.from_numpy(pair.lora_b @ pair.lora_a)
    ratio = given["magnitude"] / weight.norm(dim=1) if "magnitude" in given else 1
    return given.get("factor", 1) * (ratio * (x @ weight.T) + given.get("bias", bias) + given.get("shift", 0))
