"""The screen of an output head: its rows in 8 bits, and how far off these are; `best_tokens.cpp` says what for."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase_kernels.cpu import memory
from onebase_kernels.int8 import MAX_CODE, Int8Weight, dequantize_int8, quantize_int8

_TOKENS = 16
"""Of a block, which is computed with the head where one of its tokens may be the best."""
_INPUTS = 64
"""Of a tile of bytes."""
_MAX_INPUTS = 1 << 15
"""More could overflow the 32 bits of a sum of products of bytes."""
_ROWS_AT_A_TIME = 4096
"""Of the head; what is computed from them is in fp32."""
_SMALLEST_ERROR = 1e-30


@dataclass(frozen=True, eq=False)
class TiledScreen:
    """A head [V, K] in 8 bits, packed."""

    codes: Tensor
    """uint8 [V / 16, K / 64, 16, 64]: int8 codes + 128."""
    scales: Tensor
    """fp32 [V], of a code."""
    errors: Tensor
    """fp32 [V]: a logit is at most this many times the length of the hidden state from what the codes make of it."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the head."""
        return self.codes.nbytes + self.scales.nbytes + self.errors.nbytes


def can_pack(head: Tensor) -> bool:
    """Whether the kernel carries this head [V, K]: bfloat16, whole tiles, on the CPU."""
    vocab, inputs = head.shape
    is_whole = vocab % _TOKENS == 0 and inputs % _INPUTS == 0 and inputs <= _MAX_INPUTS
    return head.dtype == torch.bfloat16 and head.device.type == "cpu" and is_whole


def pack(head: Tensor) -> TiledScreen | None:
    """Round a head for which `can_pack` holds; None if one of its numbers is not finite, for nothing bounds it then."""
    vocab, inputs = head.shape
    codes = memory.empty((vocab // _TOKENS, inputs // _INPUTS, _TOKENS, _INPUTS), torch.uint8)
    scales, errors = torch.empty(vocab), torch.empty(vocab)
    for start in range(0, vocab, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, vocab)
        rows = head[start:stop].float()
        rounded = quantize_int8(rows)
        scales[start:stop] = rounded.absmax / MAX_CODE
        errors[start:stop] = _errors(rows, rounded)
        tiles = rounded.codes.view(-1, _TOKENS, inputs // _INPUTS, _INPUTS).transpose(1, 2)
        codes[start // _TOKENS : stop // _TOKENS] = tiles.to(torch.int16) + 128
    return TiledScreen(codes, scales, errors) if errors.isfinite().all() else None


def _errors(rows: Tensor, rounded: Int8Weight) -> Tensor:
    """What the codes lose, and in its wake what hidden states rounded to 16 bits and sums in fp32 do, at the most."""
    lost = (rows - dequantize_int8(rounded, torch.float32)).norm(dim=1)
    inputs = rows.shape[1]
    rounding = math.sqrt(inputs) * 2**-15 + inputs * 2**-23 + 2**-18
    errors: Tensor = lost * (1 + 2**-10) + rows.norm(dim=1) * rounding
    return errors.clamp_min(_SMALLEST_ERROR)
