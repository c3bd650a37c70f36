"""Block-wise 4-bit quantisation by a codebook, NF4 or FP4: the weight, to it and back.

Every bit is what bitsandbytes' `quantize_4bit(weight, quant_type=codebook.name, blocksize=64)` gives, with and without
`compress_statistics` (double quantisation). Work goes in chunks, so that the peak is the result and a few MiB.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK_SIZE = 64
"""Consecutive weights (row-major) that share a scale."""
NESTED_BLOCK_SIZE = 256
"""Consecutive scales that share a scale of their own under double quantisation."""


@dataclass(frozen=True)
class Codebook:
    """What the codes 0 to 15 stand for, in [-1, 1]."""

    name: str
    """bitsandbytes' `quant_type`."""
    values: tuple[float, ...]


NF4 = Codebook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
"""Quantiles of the standard normal distribution and an exact zero (QLoRA, arXiv 2305.14314, section 3, appendix E)."""

_FP4_MAGNITUDES = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
FP4 = Codebook("fp4", (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)))
"""Floating point of 4 bits as bitsandbytes has it: a sign, two bits of exponent, one of fraction; the largest is 1."""

_TINY = 1e-38  # what a block of zeros is divided by
_CHUNK = 1 << 21  # weights worked on at a time; a multiple of the block size
_GRID = 65535  # steps of the grid that scales are rounded to on their way to 8 bits


@dataclass(frozen=True, eq=False)
class NestedScales:
    """What turns the 8-bit scales of double quantisation back into fp32: `map[code] · absmax + offset`."""

    absmax: Tensor
    """fp32 [⌈blocks / 256⌉]."""
    offset: Tensor
    """fp32 scalar: the mean of the scales, subtracted before they were quantised."""
    quant_map: Tensor
    """fp32 [256]: the values that the codes stand for, ascending."""

    def to(self, device: torch.device) -> "NestedScales":
        """The same on `device`."""
        return NestedScales(self.absmax.to(device), self.offset.to(device), self.quant_map.to(device))


@dataclass(frozen=True, eq=False)
class BlockwiseWeight:
    """A linear's weight [out, in] in NF4 or FP4: a code for each weight, a scale for each block of 64."""

    codes: Tensor
    """uint8 [⌈out · in / 2⌉]: two codes to a byte, the first in the high half."""
    absmax: Tensor
    """The block scales [⌈out · in / 64⌉]: fp32, or uint8 codes when `nested` is there."""
    shape: tuple[int, int]
    nested: NestedScales | None = None
    codebook: Codebook = NF4

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, the maps that all weights have alike left out."""
        return self.codes.nbytes + self.absmax.nbytes + (self.nested.absmax.nbytes + 4 if self.nested else 0)

    def to(self, device: torch.device) -> "BlockwiseWeight":
        """The same on `device`."""
        nested = self.nested.to(device) if self.nested else None
        return BlockwiseWeight(self.codes.to(device), self.absmax.to(device), self.shape, nested, self.codebook)

    def scales(self) -> Tensor:
        """The block scales in fp32, `[⌈out · in / 64⌉]`."""
        if self.nested is None:
            return self.absmax
        values = self.nested.quant_map[self.absmax.int()]
        per_block = self.nested.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: values.numel()]
        return values * per_block + self.nested.offset


def quantize_nf4(weight: Tensor, double_quant: bool = True) -> BlockwiseWeight:
    """Round `weight` [out, in] (fp32, bf16 or fp16) to NF4; `double_quant` rounds the block scales to 8 bits too."""
    return _quantize(weight, NF4, double_quant)


def quantize_fp4(weight: Tensor, double_quant: bool = True) -> BlockwiseWeight:
    """Round `weight` [out, in] (fp32, bf16 or fp16) to FP4; `double_quant` rounds the block scales to 8 bits too."""
    return _quantize(weight, FP4, double_quant)


def dequantize_blockwise(weight: BlockwiseWeight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that the codes stand for: fp32 products, rounded once to `dtype`."""
    count = weight.shape[0] * weight.shape[1]
    out = torch.empty(count, dtype=dtype, device=weight.codes.device)
    pairs = _value_pairs(weight.codebook, weight.codes.device)
    scales = weight.scales()
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        values = pairs[weight.codes[start // 2 : (stop + 1) // 2].int()].view(-1)[: stop - start]
        block_scales = scales[start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)].repeat_interleave(BLOCK_SIZE)
        out[start:stop] = values * block_scales[: stop - start]
    return out.view(weight.shape)


def _quantize(weight: Tensor, codebook: Codebook, double_quant: bool) -> BlockwiseWeight:
    chunks = [_quantize_chunk(chunk, codebook) for chunk in torch.split(weight.reshape(-1), _CHUNK)]
    codes = torch.cat([codes for codes, _ in chunks])
    absmax = torch.cat([absmax for _, absmax in chunks])
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return BlockwiseWeight(codes, absmax, shape, codebook=codebook)
    scale_codes, nested = _quantize_scales(absmax)
    return BlockwiseWeight(codes, scale_codes, shape, nested, codebook)


def _quantize_chunk(chunk: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Codes and scales of consecutive weights that start on a block boundary."""
    values = chunk.float()
    ragged = values.numel() % BLOCK_SIZE
    whole = values.numel() - ragged
    blocks = values[:whole].view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    # Multiplying by the reciprocal and dividing round differently; bitsandbytes does the one for whole blocks and the
    # other for the ragged last one.
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).view(-1)
    if ragged:
        last_absmax = values[whole:].abs().amax().clamp(min=_TINY)
        absmax = torch.cat([absmax, last_absmax.view(1)])
        scaled = torch.cat([scaled, values[whole:] / last_absmax])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    order, midpoints = _ascending(codebook, chunk.device)
    codes = order[torch.bucketize(scaled, midpoints, out_int32=True)]
    return (codes[::2] << 4) | codes[1::2], absmax


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    """Double quantisation (the paper's section 3): scales less their mean, in 8 bits with a scale per block of 256."""
    offset = absmax.mean()
    centred = absmax - offset
    nested_absmax = torch.stack([block.abs().amax() for block in torch.split(centred, NESTED_BLOCK_SIZE)])
    normed = centred * (1.0 / nested_absmax).repeat_interleave(NESTED_BLOCK_SIZE)[: centred.numel()]
    normed = normed.nan_to_num(-1.0)  # 0 · ∞ where all scales are alike: the code does not matter, bitsandbytes has 0
    codes = _nearest_on_grid(absmax.device)[((normed + 1) * 0.5 * _GRID + 0.5).int()]
    return codes, NestedScales(nested_absmax, offset, dynamic_map(absmax.device))


@cache
def _nearest_on_grid(device: torch.device) -> Tensor:
    """uint8 [65536]: the code nearest to each point of an even grid over [-1, 1].

    bitsandbytes rounds to this grid first, on the CPU, and so near the midpoint of two codes not to the nearer one.
    """
    quant_map = dynamic_map(device)
    grid = torch.arange(_GRID + 1, device=device) * (2.0 / _GRID) - 1.0
    return torch.bucketize(grid, (quant_map[:-1] + quant_map[1:]) / 2).to(torch.uint8)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending, fp32 (arXiv 1511.04561; 2110.02861, figure 2).

    A value has a decimal exponent from -6 to 0; the larger it is, the more of the 7 bits are left for the fraction,
    whose values are the midpoints of an even division of [0.1, 1]. Zero and one complete the table.
    """
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        borders = torch.linspace(0.1, 1, 2 ** (exponent + 6) + 1, dtype=torch.float32)
        fractions = 10**exponent * ((borders[:-1] + borders[1:]) / 2.0)
        values += fractions.tolist() + (-fractions).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _ascending(codebook: Codebook, device: torch.device) -> tuple[Tensor, Tensor]:
    """The codes by ascending value, uint8 [16], and the values halfway from each to the next, fp32 [15]."""
    values = torch.tensor(codebook.values, dtype=torch.float32, device=device)
    values, order = torch.sort(values, stable=True)  # FP4 has two zeros
    return order.to(torch.uint8), (values[:-1] + values[1:]) / 2


@cache
def _value_pairs(codebook: Codebook, device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two values that a byte of codes stands for."""
    values = torch.tensor(codebook.values, dtype=torch.float32, device=device)
    return torch.cartesian_prod(values, values)
