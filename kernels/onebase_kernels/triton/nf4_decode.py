"""NF4 codes to numbers that the tensor cores take, in under two instructions a code.

A byte permutation (PRMT) is a lookup of four 4-bit codes at once, but of bytes, in a table of eight. Two things make
few of them enough:

- The codebook is scaled so that its values are small multiples of the smallest subnormal of the operand's type. Then a
  value and its neighbour, two codes that differ in one bit, have the same high byte, and their low bytes differ by less
  than 128. So a number is `low[pair] + (difference[pair] if the bit is clear) | high[pair] << 8`: three permutations.
- The scale is free to choose, as it is taken back with the block's own scale. The one chosen rounds the 16 values with
  least squared error: 4e-4 of the largest value (rms) in both types, less than rounding NF4 itself to bfloat16 does.

The numbers are subnormal or close to it, so their products with bfloat16 would be lost in fp32; `INPUT_SCALE`, a power
of two, lifts the other operand. Tensor cores take subnormal operands as they are (Fasi et al., PeerJ CS 7:e330).
This module knows neither how weights lie in memory nor their scales.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onebase_kernels.blockwise import NF4

RECODED = tuple(
    (code - 8) >> 1 | (~code & 1) << 3 if code >= 8 else 4 | (7 - code) >> 1 | (code & 1) << 3 for code in range(16)
)
"""The code that stands for each NF4 code: a pair of neighbours (0-3 positive, 4-7 negative, zero among them) in the low
three bits, and a bit that is set for the smaller of the two."""

TABLE_COPIES = 8
"""Each thread reads tables of its own: tables that are the same for a whole warp end up in uniform registers, which
PRMT cannot read."""


@dataclass(frozen=True)
class Codebook:
    """NF4 in one operand type."""

    steps: float
    """Multiples of the smallest subnormal that stand for 1."""
    smallest: float
    """The smallest subnormal."""
    input_scale: float
    """What the other operand is to be multiplied by."""

    @property
    def output_scale(self) -> float:
        """What a product of both operands is to be multiplied by."""
        return 1 / (self.steps * self.input_scale * self.smallest)


CODEBOOKS = {
    torch.bfloat16: Codebook(steps=735.73765, smallest=2.0**-133, input_scale=2.0**66),
    torch.float16: Codebook(steps=417.8227, smallest=2.0**-24, input_scale=1.0),
}
"""Operand types that the codes can be decoded to. `steps` has the least squared error of all scales that fulfil the
conditions above; the tests hold both."""


def nf4_values() -> Tensor:
    """fp32 [16]: NF4's values in the order of the recoded codes; zero is the smaller of a negative pair, so -0.0."""
    values = torch.empty(16, device="cpu")
    values[list(RECODED)] = torch.tensor([value or -0.0 for value in NF4.values], device="cpu")
    return values


def operands(dtype: torch.dtype) -> Tensor:
    """`dtype` [16]: the numbers that the recoded codes are decoded to."""
    codebook = CODEBOOKS[dtype]
    return (nf4_values().double() * (codebook.steps * codebook.smallest)).to(dtype)


def byte_tables(dtype: torch.dtype) -> Tensor:
    """int32 [6]: the words of the three tables of eight bytes, low, difference and high, that are permuted."""
    bits = operands(dtype).view(torch.int16).int() & 0xFFFF
    larger, smaller = bits[:8], bits[8:]
    return torch.cat([smaller & 0xFF, larger - smaller, smaller >> 8]).to(torch.uint8).view(torch.int32)


@cache
def nf4_values_on(device: torch.device) -> Tensor:
    """`nf4_values` on a device."""
    return nf4_values().to(device)


@cache
def multiples_on(device: torch.device, dtype: torch.dtype) -> Tensor:
    """fp32 [16]: `operands` on a device, as multiples of the smallest subnormal."""
    return (operands(dtype).double() / CODEBOOKS[dtype].smallest).float().to(device)


@cache
def byte_tables_on(device: torch.device, dtype: torch.dtype) -> Tensor:
    """int32 [6, TABLE_COPIES]: `byte_tables` on a device, for each thread its own."""
    return byte_tables(dtype).unsqueeze(1).repeat(1, TABLE_COPIES).to(device)


DECODE_ASM = tl.constexpr("""
{
.reg .b32 word, pairs, low, difference, high, first, second;
and.b32 pairs, $8, 0x77777777;
prmt.b32 low, $9, $10, pairs;
prmt.b32 difference, $11, $12, $8;
add.u32 low, low, difference;
prmt.b32 high, $13, $14, pairs;
prmt.b32 first, low, high, 0x6240;
prmt.b32 second, low, high, 0x7351;
mov.b32 {$0, $1}, first;
mov.b32 {$4, $5}, second;
shr.u32 word, $8, 16;
shr.u32 pairs, pairs, 16;
prmt.b32 low, $9, $10, pairs;
prmt.b32 difference, $11, $12, word;
add.u32 low, low, difference;
prmt.b32 high, $13, $14, pairs;
prmt.b32 first, low, high, 0x6240;
prmt.b32 second, low, high, 0x7351;
mov.b32 {$2, $3}, first;
mov.b32 {$6, $7}, second;
}
""")
"""A word of eight codes, $8, to eight 16-bit numbers: $0-$3 those of the bytes' low halves, $4-$7 of their high halves.

A set bit 3 makes PRMT copy the chosen byte's sign instead of the byte: of a difference, which is below 128, that is 0.
"""


@triton.jit
def load_tables(tables_ptr, rows, COPIES: tl.constexpr):
    """The six words of `byte_tables_on`, each [rows, 1]."""
    copy = tables_ptr + (rows % COPIES)[:, None]
    return (
        tl.load(copy),
        tl.load(copy + COPIES),
        tl.load(copy + 2 * COPIES),
        tl.load(copy + 3 * COPIES),
        tl.load(copy + 4 * COPIES),
        tl.load(copy + 5 * COPIES),
    )


@triton.jit
def decode_with_permutations(words, tables, like_ptr):
    """The eight numbers of each word, in the type that `like_ptr` points to, those of its bytes' low halves first."""
    return tl.inline_asm_elementwise(
        DECODE_ASM,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r",
        [words, tables[0], tables[1], tables[2], tables[3], tables[4], tables[5]],
        dtype=(like_ptr.dtype.element_ty,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode_with_loads(words, values_ptr):
    """As `decode_with_permutations`, in Triton's interpreter and for fp32: any values [16], in any type."""
    return (
        tl.load(values_ptr + (words & 15)),
        tl.load(values_ptr + (words >> 8 & 15)),
        tl.load(values_ptr + (words >> 16 & 15)),
        tl.load(values_ptr + (words >> 24 & 15)),
        tl.load(values_ptr + (words >> 4 & 15)),
        tl.load(values_ptr + (words >> 12 & 15)),
        tl.load(values_ptr + (words >> 20 & 15)),
        tl.load(values_ptr + (words >> 28 & 15)),
    )


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which knows no inline assembly."""
    interpret: Any = triton.knobs.runtime.interpret
    return bool(interpret)


def decoding(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """What a kernel is given to decode to an operand type, or to fp32, which has no codebook: a table and constants."""
    codebook = CODEBOOKS.get(dtype)
    if codebook is None:
        return nf4_values_on(device), {"PERMUTE": False, "INPUT_SCALE": 1.0, "OUTPUT_SCALE": 1.0}
    if is_interpreted():
        return multiples_on(device, dtype), {"PERMUTE": False, "INPUT_SCALE": 1.0, "OUTPUT_SCALE": 1 / codebook.steps}
    scales = {"INPUT_SCALE": codebook.input_scale, "OUTPUT_SCALE": codebook.output_scale}
    return byte_tables_on(device, dtype), {"PERMUTE": True, **scales}
