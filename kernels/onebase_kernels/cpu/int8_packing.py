"""Int8 weights in the order in which the C++ kernel reads them; `int8_weight.h` describes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from onebase_kernels.cpu.calls import Int8Group, Int8Linear
from onebase_kernels.cpu.memory import resident
from onebase_kernels.cpu.tiles import OUTPUTS, TiledWeights
from onebase_kernels.int8 import Int8Weight
from onebase_kernels.quantized import QuantizedWeight

_INPUTS = 32
"""Of a tile of AMX."""


@dataclass(frozen=True, eq=False)
class TiledInt8(TiledWeights):
    """Weights by rows, packed."""

    call = Int8Linear

    codes: Tensor
    """int8 [ΣN · K]."""
    absmax: Tensor
    """fp32 [ΣN]."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.absmax.nbytes

    def unpack(self) -> tuple[Int8Weight, ...]:
        """The weights that were packed, bit by bit."""
        codes = torch.split(self.codes, [width * self.in_features for width in self.widths])
        absmax = torch.split(self.absmax, list(self.widths))
        return tuple(
            Int8Weight(_unpack_codes(codes[i], width), absmax[i].clone()) for i, width in enumerate(self.widths)
        )


def can_pack(weights: Sequence[QuantizedWeight]) -> TypeGuard[Sequence[Int8Weight]]:
    """Whether the kernel carries these weights: int8, whole tiles, on the CPU."""
    return all(
        isinstance(weight, Int8Weight)
        and weight.shape[0] % OUTPUTS == 0
        and weight.shape[1] % _INPUTS == 0
        and weight.codes.device.type == "cpu"
        for weight in weights
    )


def pack(weights: Sequence[Int8Weight]) -> TiledInt8:
    """Pack weights [Nᵢ, K] that share their input; `can_pack` must hold. Nothing of the weights is kept."""
    in_features = weights[0].shape[1]
    codes = resident(torch.cat([_pack_codes(weight.codes) for weight in weights]))
    absmax = torch.cat([weight.absmax for weight in weights])
    widths = tuple(weight.shape[0] for weight in weights)
    group = Int8Group(codes=codes.data_ptr(), absmax=absmax.data_ptr(), num_outputs=sum(widths), num_inputs=in_features)
    return TiledInt8(widths, in_features, group, codes, absmax)


def _pack_codes(codes: Tensor) -> Tensor:
    n, k = codes.shape
    return codes.view(n // OUTPUTS, OUTPUTS, k // 2, 2).transpose(1, 2).reshape(-1)


def _unpack_codes(codes: Tensor, n: int) -> Tensor:
    return codes.view(n // OUTPUTS, -1, OUTPUTS, 2).transpose(1, 2).reshape(n, -1)
