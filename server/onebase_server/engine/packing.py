"""An adapter laid out as the kernels read it: one flat run of numbers and a table of where each group's lie.

The layout is the contract of `onebase_kernels.add_lora_`. It knows nothing of the arena that the run is copied into.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase_adapters.adapter import Adapter, LowRankPair, ModuleKey
from onebase_kernels import TABLE_COLUMNS
from onebase_server.engine.epilogue import gain_and_shift
from onebase_server.model.arrays import as_tensor, float32
from onebase_server.model.config import ModelConfig
from onebase_server.model.linear import LinearGroup

RANKS = slice(1, 4)
"""The columns of the table that hold ranks."""
EPILOGUES = 4
"""The column that holds a bit for each slice with an epilogue."""


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


def pack_adapter(
    adapter: Adapter, config: ModelConfig, dtype: torch.dtype, base: Sequence[LinearGroup]
) -> PackedAdapter:
    """Per layer and projection group: the slices' A stacked [Σrᵢ, in], then each slice's s·B transposed [rᵢ, outᵢ],
    then gain and shift [2, outᵢ] of each slice that has an epilogue.

    `base` holds the base's groups by place, for what an epilogue needs of them.
    """
    numbers = torch.empty(adapter.num_parameters, dtype=dtype)
    table = torch.zeros(config.num_layers, len(config.projection_groups), TABLE_COLUMNS, dtype=torch.int64)
    end = 0
    for layer in range(config.num_layers):
        for index, group in enumerate(config.projection_groups):
            keys = [ModuleKey(layer, projection) for projection in group.projections]
            pairs = [adapter.pairs.get(key) for key in keys]
            ranks = [pair.rank if pair else 0 for pair in pairs]
            table[layer, index, : 1 + len(ranks)] = torch.tensor([end, *ranks])
            vectors = []
            for i, key in enumerate(keys):
                if key in adapter.epilogues:
                    place = base[layer * len(config.projection_groups) + index]
                    vectors.append(gain_and_shift(adapter.epilogues[key], pairs[i], place, i))
                    table[layer, index, EPILOGUES] |= 1 << i
            for matrix in (*_matrices([pair for pair in pairs if pair]), *vectors):
                numbers[end : end + matrix.numel()].view(matrix.shape).copy_(matrix)
                end += matrix.numel()
    assert end == numbers.numel(), "all that the adapter has belongs to one of the base's projections"
    return PackedAdapter(numbers, table)


def _matrices(pairs: list[LowRankPair]) -> list[Tensor]:
    """A group's matrices in the order of the layout; the scale is folded in before rounding to the compute dtype."""
    return [as_tensor(pair.lora_a) for pair in pairs] + [float32(pair.lora_b).T * pair.scale for pair in pairs]
