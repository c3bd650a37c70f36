"""Quantised weights of any format, and a projection group of them as the torch back ends hold it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onebase_kernels.blockwise import BlockwiseWeight, dequantize_blockwise
from onebase_kernels.int4 import Int4Weight, dequantize_int4
from onebase_kernels.int8 import Int8Weight, dequantize_int8

QuantizedWeight = BlockwiseWeight | Int4Weight | Int8Weight
"""A linear's weight [out, in] in fewer bits."""


class PackedWeights(Protocol):
    """The weights of a projection group in the order in which one back end wants to read them; others cannot."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of each weight."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""

    @property
    def num_parameters(self) -> int:
        """Weights that they stand for."""


@dataclass(frozen=True, eq=False)
class WeightGroup:
    """The weights of a projection group as they are: the packing of the torch back ends."""

    weights: tuple[QuantizedWeight, ...]
    """[Nᵢ, K] each."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of each weight."""
        return tuple(weight.shape[0] for weight in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def num_parameters(self) -> int:
        """Weights that they stand for."""
        return sum(weight.shape[0] * weight.shape[1] for weight in self.weights)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that the codes stand for, computed in fp32 and rounded once to `dtype`."""
    match weight:
        case BlockwiseWeight():
            return dequantize_blockwise(weight, dtype)
        case Int4Weight():
            return dequantize_int4(weight, dtype)
        case Int8Weight():
            return dequantize_int8(weight, dtype)


def unpacked(packed: PackedWeights) -> WeightGroup:
    """`packed` itself, if it is the torch back ends' packing; raises TypeError."""
    if not isinstance(packed, WeightGroup):
        raise TypeError("These weights were packed by another back end; choose the back end before loading.")
    return packed


def join_linears(
    packed: PackedWeights, linear: Callable[[QuantizedWeight], Tensor], bias: Tensor | None = None
) -> Tensor:
    """`linear` of each weight of a `WeightGroup`, [T, Nᵢ], side by side, plus bias [ΣNᵢ]: [T, ΣNᵢ]."""
    outputs = [linear(weight) for weight in unpacked(packed).weights]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return joined if bias is None else joined + bias
