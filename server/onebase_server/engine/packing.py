"""An adapter laid out as the kernels read it: one flat run of numbers and a table of where each group's lie.

The layout is the contract of `onebase_kernels.add_lora_`. It knows nothing of the arena that the run is copied into.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onebase_adapters.adapter import Adapter, Array, LowRankPair, ModuleKey
from onebase_kernels import TABLE_COLUMNS
from onebase_server.model.config import ModelConfig

RANKS = slice(1, 4)
"""The columns of the table that hold ranks."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in the kernels' layout, on the host."""

    numbers: Tensor
    """1-D, compute dtype."""
    table: Tensor
    """int64 [layers, groups, 5]; offsets count from the start of `numbers`."""

    @property
    def max_rank(self) -> int:
        """The most ranks at one place, all slices of the group together."""
        return int(self.table[..., RANKS].sum(dim=-1).max())


def pack_adapter(adapter: Adapter, config: ModelConfig, dtype: torch.dtype) -> PackedAdapter:
    """Per layer and projection group: the slices' A stacked [Σrᵢ, in], then each slice's s·B transposed [rᵢ, outᵢ]."""
    numbers = torch.empty(adapter.num_parameters, dtype=dtype)
    table = torch.zeros(config.num_layers, len(config.projection_groups), TABLE_COLUMNS, dtype=torch.int64)
    end = 0
    for layer in range(config.num_layers):
        for index, group in enumerate(config.projection_groups):
            pairs = [adapter.pairs.get(ModuleKey(layer, projection)) for projection in group.projections]
            ranks = [pair.rank if pair else 0 for pair in pairs]
            table[layer, index, : 1 + len(ranks)] = torch.tensor([end, *ranks])
            for matrix in _matrices([pair for pair in pairs if pair]):
                numbers[end : end + matrix.numel()] = matrix.flatten()
                end += matrix.numel()
    assert end == numbers.numel(), "every pair of the adapter belongs to one of the base's projections"
    return PackedAdapter(numbers, table)


def _matrices(pairs: list[LowRankPair]) -> list[Tensor]:
    """A group's matrices in the order of the layout; the scale is folded in before rounding to the compute dtype."""
    return [_float32(pair.lora_a) for pair in pairs] + [_float32(pair.lora_b).T * pair.scale for pair in pairs]


def _float32(array: Array) -> Tensor:
    """A torch copy of a mapped array, whatever its dtype (torch does not know numpy's bfloat16)."""
    return torch.from_numpy(array.astype(np.float32))
