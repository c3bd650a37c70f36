"""NF4 and FP4 weights in the order in which the C++ kernel reads them; `blockwise_weight.h` describes it."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from onebase_kernels.blockwise import BLOCK_SIZE, BlockwiseWeight, Codebook, NestedScales
from onebase_kernels.cpu.calls import BlockwiseGroup, BlockwiseLinear, BlockwiseSlice
from onebase_kernels.cpu.memory import resident
from onebase_kernels.cpu.tiles import OUTPUTS, TiledWeights, pack_codes, pack_scales, unpack_codes, unpack_scales
from onebase_kernels.quantized import QuantizedWeight

OFFSET_BYTES = 4
"""Of a weight under double quantisation, the mean of its scales."""


@dataclass(frozen=True, eq=False)
class TiledBlockwise(TiledWeights):
    """Weights of one codebook, packed."""

    call = BlockwiseLinear

    codebook: Codebook
    values: Tensor
    """fp32 [16]: of the codebook."""
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
    slices: "ctypes.Array[BlockwiseSlice]"

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, the map that all weights have alike left out (as `BlockwiseWeight` counts)."""
        nested = sum(scales.nbytes + OFFSET_BYTES for scales in self.nested_scales)
        return self.codes.nbytes + self.scales.nbytes + nested

    def unpack(self) -> tuple[BlockwiseWeight, ...]:
        """The weights that were packed, bit by bit."""
        sizes = [width * self.in_features for width in self.widths]
        codes = torch.split(self.codes, [size // 2 for size in sizes])
        scales = torch.split(self.scales, [size // BLOCK_SIZE for size in sizes])
        return tuple(
            BlockwiseWeight(
                codes=unpack_codes(codes[i], self.in_features),
                absmax=unpack_scales(scales[i], self.in_features // BLOCK_SIZE),
                shape=(width, self.in_features),
                nested=self._nested(i),
                codebook=self.codebook,
            )
            for i, width in enumerate(self.widths)
        )

    def _nested(self, index: int) -> NestedScales | None:
        if self.quant_map is None:
            return None
        return NestedScales(self.nested_scales[index], torch.tensor(self.offsets[index]), self.quant_map)


def can_pack(weights: Sequence[QuantizedWeight]) -> TypeGuard[Sequence[BlockwiseWeight]]:
    """Whether the kernel carries these weights: whole tiles, on the CPU, alike in codebook and nested scales."""
    carried = [
        weight
        for weight in weights
        if isinstance(weight, BlockwiseWeight)
        and weight.shape[0] % OUTPUTS == 0
        and weight.shape[1] % BLOCK_SIZE == 0
        and weight.codes.device.type == "cpu"
    ]
    kinds = {(weight.codebook, weight.nested is None) for weight in carried}
    return len(carried) == len(weights) and len(kinds) == 1


def pack(weights: Sequence[BlockwiseWeight]) -> TiledBlockwise:
    """Pack weights [Nᵢ, K] that share their input; `can_pack` must hold.

    Nothing of the weights is kept: a single view would hold the whole mapped file in memory beside what is packed.
    """
    in_features = weights[0].shape[1]
    codebook = weights[0].codebook
    values = torch.tensor(codebook.values, dtype=torch.float32)
    codes = resident(torch.cat([pack_codes(weight.codes, *weight.shape) for weight in weights]))
    scales = resident(torch.cat([pack_scales(weight.absmax, weight.shape[0]) for weight in weights]))
    widths = tuple(weight.shape[0] for weight in weights)
    nested = [weight.nested for weight in weights if weight.nested is not None]
    nested_scales = tuple(scale.absmax.clone() for scale in nested)
    offsets = tuple(float(scale.offset) for scale in nested) or (0.0,) * len(weights)
    quant_map = nested[0].quant_map.clone() if nested else None
    slices = (BlockwiseSlice * len(weights))(
        *(
            BlockwiseSlice(nested_scales[i].data_ptr() if nested else None, offsets[i], width)
            for i, width in enumerate(widths)
        )
    )
    group = BlockwiseGroup(
        values=values.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        quant_map=quant_map.data_ptr() if quant_map is not None else None,
        slices=ctypes.addressof(slices),
        num_outputs=sum(widths),
        num_inputs=in_features,
    )
    return TiledBlockwise(
        widths=widths,
        in_features=in_features,
        group=group,
        codebook=codebook,
        values=values,
        codes=codes,
        scales=scales,
        nested_scales=nested_scales,
        offsets=offsets,
        quant_map=quant_map,
        slices=slices,
    )
