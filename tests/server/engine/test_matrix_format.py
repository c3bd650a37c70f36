"""Where an adapter's matrices go among an arena's numbers, in either format."""

import pytest
import torch

import onebase_kernels as kernels
from onebase_adapters.adapter import ModuleKey
from onebase_kernels import LoraBatch, Segment
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.packing import pack_adapter
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig

from .conftest import TINY, random_adapter

RANKS = {"q_proj": 4, "v_proj": 1, "o_proj": 3, "up_proj": 2, "down_proj": 7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_in_8_bits_computes_what_its_pairs_say_but_for_their_rounding(
    tiny_config: ModelConfig, dtype: torch.dtype
) -> None:
    adapter = random_adapter(tiny_config, RANKS)
    matrix_format = MatrixFormat(dtype, is_int8=True)
    packed = pack_adapter(adapter, tiny_config, matrix_format, base=())
    x = torch.randn(5, 48).to(dtype)
    for layer in range(tiny_config.num_layers):
        for index, group in enumerate(tiny_config.projection_groups):
            inputs, y = x[:, : group.in_features].contiguous(), torch.zeros(5, sum(group.widths), dtype=dtype)
            row = packed.table[layer, index]
            assert row[0] % matrix_format.alignment(tiny_config) == 0
            lora = LoraBatch(packed.numbers, row.view(1, 1, -1), (Segment(0, 0, 5),), is_int8=True)
            kernels.add_lora_(y, inputs, lora, 0, group.widths)
            for part, projection in zip(torch.split(y, list(group.widths), dim=1), group.projections, strict=True):
                pair = adapter.pairs.get(ModuleKey(layer, projection))
                if pair is None:
                    assert not part.any()
                    continue
                update = torch.from_numpy(pair.lora_b) @ torch.from_numpy(pair.lora_a)
                expected = pair.scale * inputs.float() @ update.T
                assert (part.float() - expected).norm() < 2e-2 * expected.norm()


def test_an_adapter_in_8_bits_takes_half_the_memory_and_its_scales() -> None:
    config = ModelConfig.from_hf(TINY | {"hidden_size": 256, "intermediate_size": 512})
    adapter = random_adapter(config, {"q_proj": 16, "down_proj": 16})
    packed = pack_adapter(adapter, config, MatrixFormat(torch.bfloat16, is_int8=True), base=())
    scales = 2 * 2 * 2 * 16 * torch.float32.itemsize  # two layers, two linears, of A and B
    assert packed.numbers.nbytes == adapter.num_parameters + scales


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_place_without_pairs_takes_nothing(is_int8: bool) -> None:
    matrix_format = MatrixFormat(torch.bfloat16, is_int8=is_int8)
    assert matrix_format.place([], 32) == ([], 32)


def test_linears_of_odd_widths_cannot_have_adapters_in_8_bits() -> None:
    config = ModelConfig.from_hf(TINY | {"intermediate_size": 50})
    assert MatrixFormat(torch.bfloat16).alignment(config) == 2
    with pytest.raises(ConfigurationError, match="multiples of 4; this base has 16, 32, 50"):
        MatrixFormat(torch.bfloat16, is_int8=True).alignment(config)
