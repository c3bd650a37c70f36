"""What the C++ packings of all formats share: groups of weights, and the order of codes of 4 bits and of scales.

`blockwise_weight.h` describes that order.
"""

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from onebase_kernels.cpu.calls import QuantizedLinear
from onebase_kernels.quantized import QuantizedWeight

OUTPUTS = 16
"""Outputs that are computed together."""
ROW_INPUTS = 8
"""Inputs of a row of codes."""


@dataclass(frozen=True, eq=False)
class TiledWeights(ABC):
    """The weights of a projection group, packed: their outputs lie side by side."""

    call: ClassVar[type[QuantizedLinear]]
    """What multiplies by them."""

    widths: tuple[int, ...]
    """Outputs of each weight."""
    in_features: int
    group: ctypes.Structure
    """What C++ gets: addresses of the tensors of a format."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of codes and scales."""

    @abstractmethod
    def unpack(self) -> tuple[QuantizedWeight, ...]:
        """The weights that were packed, bit by bit."""

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
        return self.out_features * self.in_features


def pack_codes(codes: Tensor, n: int, k: int) -> Tensor:
    """Codes of a weight [n, k], two to a byte, the first in the high half, as rows of 64 bytes, flat."""
    nibbles = torch.stack((codes >> 4, codes & 0xF), dim=-1)
    # [N / 16, output, K / 8, pair, parity] -> 16-bit words are (output, parity), nibbles within them pairs
    rows = nibbles.view(n // OUTPUTS, OUTPUTS, k // ROW_INPUTS, 4, 2).permute(0, 2, 1, 4, 3)
    low, high = rows.reshape(-1, 2).unbind(-1)
    return low | (high << 4)


def unpack_codes(packed: Tensor, k: int) -> Tensor:
    """What `pack_codes` was given, flat."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    rows = nibbles.view(-1, k // ROW_INPUTS, OUTPUTS, 2, 4).permute(0, 2, 1, 4, 3)
    first, second = rows.reshape(-1, 2).unbind(-1)
    return first << 4 | second


def pack_scales(scales: Tensor, n: int) -> Tensor:
    """Scales of a weight with n outputs, as many for each: those of 16 outputs side by side, flat."""
    return scales.reshape(n // OUTPUTS, OUTPUTS, -1).transpose(1, 2).reshape(-1)


def unpack_scales(packed: Tensor, per_output: int) -> Tensor:
    """What `pack_scales` was given, flat, with so many scales for each output."""
    return packed.view(-1, per_output, OUTPUTS).transpose(1, 2).reshape(-1)
