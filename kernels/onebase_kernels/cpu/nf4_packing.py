"""NF4 weights in the order in which the C++ kernel reads them; `nf4_weight.h` describes it."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from onebase_kernels.blockwise import BLOCK_SIZE, NF4, BlockwiseWeight, NestedScales
from onebase_kernels.cpu.calls import Nf4Group, Nf4Slice
from onebase_kernels.cpu.memory import resident
from onebase_kernels.quantized import QuantizedWeight

OUTPUTS = 16
"""Outputs of a tile; its inputs are one block of 64."""
OFFSET_BYTES = 4
"""Of a weight under double quantisation, the mean of its scales."""


@dataclass(frozen=True, eq=False)
class TiledNf4:
    """The weights of a projection group, packed: their outputs lie side by side."""

    codes: Tensor
    """uint8 [ΣN · K / 2]."""
    scales: Tensor
    """[ΣN · K / 64]: fp32, or uint8 under double quantisation."""
    nested_scales: tuple[Tensor, ...]
    """Of each weight, fp32 [⌈N · K / 64 / 256⌉]; none without double quantisation."""
    offsets: tuple[float, ...]
    """Of each weight, the mean of its scales; 0 without double quantisation."""
    quant_map: Tensor | None
    """fp32 [256]: the values of the uint8 scales, which all weights have alike."""
    widths: tuple[int, ...]
    """Outputs of each weight."""
    in_features: int
    group: Nf4Group
    """What C++ gets: addresses of the tensors here and of `slices`."""
    slices: "ctypes.Array[Nf4Slice]"

    @cached_property
    def address(self) -> int:
        """Of `group`."""
        return ctypes.addressof(self.group)

    @cached_property
    def out_features(self) -> int:
        """Outputs of all weights together."""
        return sum(self.widths)

    @property
    def num_parameters(self) -> int:
        """Weights that the codes stand for."""
        return 2 * self.codes.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, the map that all weights have alike left out (as `BlockwiseWeight` counts)."""
        nested = sum(scales.nbytes + OFFSET_BYTES for scales in self.nested_scales)
        return self.codes.nbytes + self.scales.nbytes + nested


def can_pack(weights: Sequence[QuantizedWeight]) -> TypeGuard[Sequence[BlockwiseWeight]]:
    """Whether the kernel carries these weights: NF4, whole tiles, on the CPU, all with or all without nested scales."""
    carried = [
        weight
        for weight in weights
        if isinstance(weight, BlockwiseWeight)
        and weight.codebook == NF4
        and weight.shape[0] % OUTPUTS == 0
        and weight.shape[1] % BLOCK_SIZE == 0
        and weight.codes.device.type == "cpu"
    ]
    return len(carried) == len(weights) and len({weight.nested is None for weight in carried}) == 1


def pack(weights: Sequence[BlockwiseWeight]) -> TiledNf4:
    """Pack weights [Nᵢ, K] that share their input; `can_pack` must hold.

    Nothing of the weights is kept: a single view would hold the whole mapped file in memory beside what is packed.
    """
    in_features = weights[0].shape[1]
    codes = resident(torch.cat([_pack_codes(weight) for weight in weights]))
    scales = resident(torch.cat([_pack_scales(weight) for weight in weights]))
    widths = tuple(weight.shape[0] for weight in weights)
    nested = [weight.nested for weight in weights if weight.nested is not None]
    nested_scales = tuple(scale.absmax.clone() for scale in nested)
    offsets = tuple(float(scale.offset) for scale in nested) or (0.0,) * len(weights)
    quant_map = nested[0].quant_map.clone() if nested else None
    slices = (Nf4Slice * len(weights))(
        *(
            Nf4Slice(nested_scales[i].data_ptr() if nested else None, offsets[i], width)
            for i, width in enumerate(widths)
        )
    )
    group = Nf4Group(
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        quant_map=quant_map.data_ptr() if quant_map is not None else None,
        slices=ctypes.addressof(slices),
        num_outputs=sum(widths),
        num_inputs=in_features,
    )
    return TiledNf4(codes, scales, nested_scales, offsets, quant_map, widths, in_features, group, slices)


def unpack(packed: TiledNf4) -> tuple[BlockwiseWeight, ...]:
    """The weights that were packed, bit by bit."""
    sizes = [width * packed.in_features for width in packed.widths]
    codes = torch.split(packed.codes, [size // 2 for size in sizes])
    scales = torch.split(packed.scales, [size // BLOCK_SIZE for size in sizes])
    return tuple(
        BlockwiseWeight(
            codes=_unpack_codes(codes[i], packed.in_features),
            absmax=_unpack_scales(scales[i], packed.in_features),
            shape=(width, packed.in_features),
            nested=_nested(packed, i),
        )
        for i, width in enumerate(packed.widths)
    )


def _nested(packed: TiledNf4, index: int) -> NestedScales | None:
    if packed.quant_map is None:
        return None
    return NestedScales(packed.nested_scales[index], torch.tensor(packed.offsets[index]), packed.quant_map)


def _pack_codes(weight: BlockwiseWeight) -> Tensor:
    n, k = weight.shape
    nibbles = torch.stack((weight.codes >> 4, weight.codes & 0xF), dim=-1)
    # [N / 16, output, K / 8, pair, parity] -> 16-bit words are (output, parity), nibbles within them pairs
    rows = nibbles.view(n // OUTPUTS, OUTPUTS, k // 8, 4, 2).permute(0, 2, 1, 4, 3)
    low, high = rows.reshape(-1, 2).unbind(-1)
    return low | (high << 4)


def _pack_scales(weight: BlockwiseWeight) -> Tensor:
    n, k = weight.shape
    return weight.absmax.view(n // OUTPUTS, OUTPUTS, k // BLOCK_SIZE).transpose(1, 2).reshape(-1)


def _unpack_codes(codes: Tensor, k: int) -> Tensor:
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1)
    rows = nibbles.view(-1, k // 8, OUTPUTS, 2, 4).permute(0, 2, 1, 4, 3)
    first, second = rows.reshape(-1, 2).unbind(-1)
    return first << 4 | second


def _unpack_scales(scales: Tensor, k: int) -> Tensor:
    return scales.view(-1, k // BLOCK_SIZE, OUTPUTS).transpose(1, 2).reshape(-1)
