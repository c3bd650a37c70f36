"""NF4 weights in the order in which tensor cores take their left operand, so that codes go from memory to registers.

A tile is 64 outputs × one block of 64 inputs, 512 words of eight codes. For its 16 rows, a warp's thread (g, q), g < 8
and q < 4, holds in a matrix instruction the inputs 2q, 2q + 1, 2q + 8 and 2q + 9 of every 16, of outputs g and g + 8.
These are a word: a byte for each input, output g in its low half. The four words of a block are one 16-byte load.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from onebase_kernels.blockwise import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4, BlockwiseWeight, NestedScales
from onebase_kernels.quantized import QuantizedWeight
from onebase_kernels.triton.nf4_decode import RECODED, is_interpreted

TILE_ROWS = 64
"""Outputs of a tile."""
TILE_WORDS = TILE_ROWS * BLOCK_SIZE // 8
"""int32 words of a tile's codes."""


@dataclass(frozen=True, eq=False)
class FragmentNf4:
    """The weights of a projection group, packed: their outputs lie one after another."""

    codes: Tensor
    """int32 [ΣN / 64, K / 64, 512]: eight recoded codes to a word."""
    scales: Tensor
    """[ΣN / 64, K / 64, 64]: fp32, or uint8 codes when `nested` is there."""
    nested: Tensor | None
    """fp32 [ΣN · K / 64 / 256]: the scales of 256 consecutive scales in the weights' own order."""
    offsets: Tensor
    """fp32 [ΣN / 64]: what is added to a tile's scales under double quantisation."""
    quant_map: Tensor | None
    """fp32 [256]: the values of the uint8 codes."""
    widths: tuple[int, ...]
    """Outputs of each weight."""
    in_features: int

    @property
    def out_features(self) -> int:
        """Outputs of all weights together."""
        return sum(self.widths)

    @property
    def num_parameters(self) -> int:
        """Weights that the codes stand for."""
        return self.out_features * self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        nested = self.nested.nbytes if self.nested is not None else 0
        return self.codes.nbytes + self.scales.nbytes + nested + self.offsets.nbytes


def can_pack(weights: Sequence[QuantizedWeight]) -> TypeGuard[Sequence[BlockwiseWeight]]:
    """Whether the kernels carry these weights: NF4, whole tiles, on a GPU (any device in Triton's interpreter)."""
    return all(
        isinstance(weight, BlockwiseWeight)
        and weight.codebook == NF4
        and weight.shape[0] % TILE_ROWS == 0
        and weight.shape[1] % BLOCK_SIZE == 0
        and (is_interpreted() or weight.codes.is_cuda)
        for weight in weights
    )


def pack(weights: Sequence[BlockwiseWeight]) -> FragmentNf4:
    """Pack weights [Nᵢ, K] that share their input; `can_pack` must hold.

    The kernels decode double quantisation where a nested block never ends within four consecutive scales of a row or
    within a weight's last rows; other shapes get their scales in fp32, as without double quantisation.
    """
    blocks = weights[0].shape[1] // BLOCK_SIZE
    nested = [weight.nested for weight in weights if weight.nested is not None]
    is_nested = (
        len(nested) == len(weights)
        and blocks % 4 == 0
        and all(weight.shape[0] * blocks % NESTED_BLOCK_SIZE == 0 for weight in weights)
    )
    tiles = torch.tensor([weight.shape[0] // TILE_ROWS for weight in weights])
    offsets = torch.stack([scale.offset.float() for scale in nested]) if is_nested else torch.zeros(len(weights))
    device = weights[0].codes.device
    return FragmentNf4(
        codes=torch.cat([_pack_codes(weight) for weight in weights]),
        scales=torch.cat([_pack_scales(weight.absmax if is_nested else weight.scales(), blocks) for weight in weights]),
        nested=torch.cat([scale.absmax for scale in nested]) if is_nested else None,
        offsets=offsets.to(device).repeat_interleave(tiles.to(device)),
        quant_map=nested[0].quant_map.contiguous() if is_nested else None,
        widths=tuple(weight.shape[0] for weight in weights),
        in_features=weights[0].shape[1],
    )


def unpack(packed: FragmentNf4) -> tuple[BlockwiseWeight, ...]:
    """The weights that were packed; where `nested` is None, with scales in fp32."""
    tiles = [width // TILE_ROWS for width in packed.widths]
    codes, scales, offsets = packed.codes.split(tiles), packed.scales.split(tiles), packed.offsets.split(tiles)
    nested: Sequence[NestedScales | None] = [None] * len(tiles)
    if packed.nested is not None and packed.quant_map is not None:
        absmax = packed.nested.split([part.numel() // NESTED_BLOCK_SIZE for part in scales])
        nested = [NestedScales(absmax[i], offsets[i][0], packed.quant_map) for i in range(len(tiles))]
    return tuple(
        BlockwiseWeight(
            codes=_unpack_codes(codes[i]),
            absmax=scales[i].transpose(1, 2).reshape(-1),
            shape=(width, packed.in_features),
            nested=nested[i],
        )
        for i, width in enumerate(packed.widths)
    )


def _pack_codes(weight: BlockwiseWeight) -> Tensor:
    n, k = weight.shape
    recoded = torch.tensor(RECODED, dtype=torch.uint8, device=weight.codes.device)
    codes = recoded[torch.stack((weight.codes >> 4, weight.codes & 0xF), dim=-1).int()]
    # [tile, 16 rows, half, g, block, 16 inputs, eight, q, odd] -> [tile, block, 16 rows, g, q, 16 inputs, ...]
    codes = codes.view(n // TILE_ROWS, 4, 2, 8, k // BLOCK_SIZE, 4, 2, 4, 2).permute(0, 4, 1, 3, 7, 5, 6, 8, 2)
    low, high = codes.reshape(-1, 2).unbind(-1)
    return (low | high << 4).view(torch.int32).view(n // TILE_ROWS, k // BLOCK_SIZE, TILE_WORDS)


def _unpack_codes(codes: Tensor) -> Tensor:
    recoded = codes.contiguous().view(torch.uint8)
    original = torch.tensor(RECODED, device=codes.device).argsort().to(torch.uint8)
    nibbles = original[torch.stack((recoded & 0xF, recoded >> 4), dim=-1).int()]
    tiles, blocks = codes.shape[:2]
    ordered = nibbles.view(tiles, blocks, 4, 8, 4, 4, 2, 2, 2).permute(0, 2, 8, 3, 1, 5, 6, 4, 7)
    first, second = ordered.reshape(-1, 2).unbind(-1)
    return first << 4 | second


def _pack_scales(scales: Tensor, blocks: int) -> Tensor:
    return scales.view(-1, TILE_ROWS, blocks).transpose(1, 2).contiguous()
