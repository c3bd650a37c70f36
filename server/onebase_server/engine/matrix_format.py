"""How an adapter's A and B are kept on the device: in the compute dtype, or in 8 bits; the kernels take either."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

import torch

from onebase_adapters.adapter import ALIGNMENT, LowRankPair
from onebase_kernels import Matrix, int8_matrices
from onebase_server.errors import ConfigurationError
from onebase_server.model.arrays import as_tensor
from onebase_server.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """What becomes of the low-rank pairs of a projection group; `onebase_kernels.add_lora_` is the contract."""

    dtype: torch.dtype
    """Of the arena: the compute dtype."""
    is_int8: bool = False

    def alignment(self, config: ModelConfig) -> int:
        """What every place among an arena's numbers begins at a multiple of; all rows in it have such lengths.

        Raises ConfigurationError if the base's linears cannot have adapters in this format.
        """
        sizes = {size for group in config.projection_groups for size in group.sizes}
        if not self.is_int8:
            return gcd(ALIGNMENT, *sizes)
        if any(size % torch.float32.itemsize for size in sizes):
            raise ConfigurationError(
                "--adapter-quantization int8 takes linears whose inputs and outputs are multiples of 4; this base has "
                f"{', '.join(map(str, sorted(sizes)))}."
            )
        return int8_matrices.LINE_BYTES // self.dtype.itemsize

    def place(self, pairs: Sequence[LowRankPair], start: int) -> tuple[list[Matrix], int]:
        """Where the matrices of a group's pairs go, from the number `start` on, and where what follows begins.

        A pair's scale is folded into B, before that is rounded.
        """
        matrices = [(as_tensor(pair.lora_a), 1.0, False) for pair in pairs]
        matrices += [(as_tensor(pair.lora_b), pair.scale, True) for pair in pairs]
        scales, start = self._place_scales([pair.rank for pair in pairs], start)
        placed = []
        for (source, scale, is_transposed), row_scales in zip(matrices, scales, strict=True):
            placed.append(Matrix(source, start, scale, is_transposed, row_scales))
            start += source.numel() // (self.dtype.itemsize if self.is_int8 else 1)
        return placed, start

    def _place_scales(self, ranks: Sequence[int], start: int) -> tuple[list[int] | list[None], int]:
        """Where the scales of every A, then of every B, begin, and where what follows does."""
        if not self.is_int8:
            return [None] * (2 * len(ranks)), start
        numbers_each = torch.float32.itemsize // self.dtype.itemsize
        rows_before = accumulate((*ranks, *ranks[:-1]), initial=0) if ranks else ()
        scales = [start + rows * numbers_each for rows in rows_before]
        return scales, start + int8_matrices.scales_size(sum(ranks), self.dtype)
