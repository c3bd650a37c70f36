"""Adapters' matrices in 8 bits: how their bytes and scales lie among an arena's numbers. `add_lora_` is the contract.

A byte stands for `scale · (byte − 128)`, with a scale for each row. Bytes have no sign because machines multiply those
without by signed inputs fastest (x86's VNNI), and 128 is what takes one sum of inputs to put right.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

ZERO = 128
"""The byte that stands for 0."""
LARGEST = 127
"""How far a row's largest number is from it."""
LINE_BYTES = 64
"""What the scales of a place are filled up to, so that the bytes of its A begin with a line of the caches."""


def scales_size(total_rank: int, dtype: torch.dtype) -> int:
    """How many numbers of an arena of `dtype` the scales of A and of B take, where these have so many rows each."""
    lines = -(-2 * total_rank * torch.float32.itemsize // LINE_BYTES)
    return lines * LINE_BYTES // dtype.itemsize


def part(numbers: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What lies from `numbers[start]` on, as a tensor of another dtype, not copied."""
    stop = start + prod(shape) * dtype.itemsize // numbers.itemsize
    return numbers[start:stop].view(torch.uint8).view(dtype).view(tuple(shape))


def encode_(target: Tensor, start: int, scales_start: int, matrix: Tensor) -> None:
    """Put a matrix [rows, columns] into `target`, its bytes from the number `start` on. A row of zeros has scale 0."""
    scales = matrix.float().abs().amax(dim=1) / LARGEST
    quotients = matrix.float() / scales.where(scales > 0, 1.0).unsqueeze(1)
    part(target, scales_start, scales.shape, torch.float32).copy_(scales)
    part(target, start, matrix.shape, torch.uint8).copy_(quotients.round() + ZERO)


def decode(matrix: Tensor, scales: Tensor) -> Tensor:
    """The numbers of uint8 [rows, columns] with scales [rows], in fp32."""
    return scales.unsqueeze(1) * (matrix.float() - ZERO)
