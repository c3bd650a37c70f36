"""Int4 weights in the order in which the C++ kernel reads them; `int4_weight.h` describes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from onebase_kernels.cpu.calls import Int4Linear, Int4Weights
from onebase_kernels.cpu.memory import resident
from onebase_kernels.cpu.tiles import OUTPUTS, TiledWeights, pack_codes, pack_scales, unpack_codes, unpack_scales
from onebase_kernels.int4 import GROUP_SIZES, Int4Weight
from onebase_kernels.quantized import QuantizedWeight


@dataclass(frozen=True, eq=False)
class TiledInt4(TiledWeights):
    """Weights of one group size, packed."""

    call = Int4Linear

    codes: Tensor
    """uint8 [ΣN · K / 2]."""
    scales: Tensor
    """float16 [ΣN · K / group size]."""
    minimums: Tensor
    """float32 [ΣN · K / group size]."""
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minimums."""
        return self.codes.nbytes + self.scales.nbytes + self.minimums.nbytes

    def unpack(self) -> tuple[Int4Weight, ...]:
        """The weights that were packed, bit by bit."""
        k, groups = self.in_features, self.in_features // self.group_size
        codes = torch.split(self.codes, [width * k // 2 for width in self.widths])
        scales = torch.split(self.scales, [width * groups for width in self.widths])
        minimums = torch.split(self.minimums, [width * groups for width in self.widths])
        return tuple(
            Int4Weight(
                codes=unpack_codes(codes[i], k).view(width, -1),
                scales=unpack_scales(scales[i], groups).view(width, -1),
                minimums=unpack_scales(minimums[i], groups).view(width, -1),
                shape=(width, k),
                group_size=self.group_size,
            )
            for i, width in enumerate(self.widths)
        )


def can_pack(weights: Sequence[QuantizedWeight]) -> TypeGuard[Sequence[Int4Weight]]:
    """Whether the kernel carries these weights: int4 of one group size, whole blocks of outputs, on the CPU."""
    carried = [
        weight
        for weight in weights
        if isinstance(weight, Int4Weight)
        and weight.shape[0] % OUTPUTS == 0
        and weight.group_size in GROUP_SIZES
        and weight.codes.device.type == "cpu"
    ]
    return len(carried) == len(weights) and len({weight.group_size for weight in carried}) == 1


def pack(weights: Sequence[Int4Weight]) -> TiledInt4:
    """Pack weights [Nᵢ, K] that share their input; `can_pack` must hold. Nothing of the weights is kept."""
    in_features, group_size = weights[0].shape[1], weights[0].group_size
    codes = resident(torch.cat([pack_codes(weight.codes, *weight.shape) for weight in weights]))
    scales = resident(torch.cat([pack_scales(weight.scales, weight.shape[0]) for weight in weights]))
    minimums = resident(torch.cat([pack_scales(weight.minimums, weight.shape[0]) for weight in weights]))
    widths = tuple(weight.shape[0] for weight in weights)
    group = Int4Weights(
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        minimums=minimums.data_ptr(),
        num_outputs=sum(widths),
        num_inputs=in_features,
        group_size=group_size,
    )
    return TiledInt4(widths, in_features, group, codes, scales, minimums, group_size)
