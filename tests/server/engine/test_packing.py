"""A packed adapter, run through the side-path op, is the adapter's own formula."""

import ml_dtypes
import numpy as np
import pytest
import torch

import onebase_kernels as kernels
from onebase_adapters.adapter import ModuleKey
from onebase_kernels import LoraBatch, Segment
from onebase_server.engine.packing import pack_adapter
from onebase_server.model.config import ModelConfig

from .conftest import random_adapter


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
    packed = pack_adapter(adapter, tiny_config, torch.float32)
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
    assert pack_adapter(adapter, tiny_config, torch.bfloat16).numbers.numel() == adapter.num_parameters
