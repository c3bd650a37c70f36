"""The base's linears in their projection groups, with the adapters of the step beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import onebase_kernels as kernels
from onebase_kernels import Nf4Weight, PackedNf4, Segment


@dataclass(frozen=True)
class LoraBatch:
    """Which rows of the step use which adapter, and where the adapters lie; `onebase_kernels.add_lora_` says how."""

    arena: Tensor
    """[E], in the compute dtype: the numbers of all adapters in device memory."""
    table: Tensor
    """int64 [layers, groups, slots, 4]: per layer and projection group, each slot's `(offset, r₀, r₁, r₂)`."""
    segments: tuple[Segment, ...]
    """Rows without an adapter are in no segment."""


class Linear(NamedTuple):
    """One projection as a checkpoint has it."""

    weight: Nf4Weight | Tensor
    """[out, in]."""
    bias: Tensor | None
    """[out]."""


@dataclass(frozen=True)
class LinearGroup:
    """The linears of one projection group of one layer, and its place in the adapters' table."""

    parts: tuple[PackedNf4 | Tensor, ...]
    """Usually one: all projections together, quantised or dense [ΣN, in]; one each where a checkpoint mixes the two."""
    widths: tuple[int, ...]
    """Output features of each projection."""
    bias: Tensor | None
    """[ΣN]."""
    layer: int
    group: int

    @classmethod
    def build(cls, linears: Sequence[Linear], layer: int, group: int) -> "LinearGroup":
        """Put a group's projections side by side; NF4 is packed for the back end that was chosen."""
        weights = [linear.weight for linear in linears]
        quantised = [weight for weight in weights if isinstance(weight, Nf4Weight)]
        dense = [weight for weight in weights if isinstance(weight, Tensor)]
        if len(quantised) == len(weights):
            parts: tuple[PackedNf4 | Tensor, ...] = (kernels.pack_nf4(quantised),)
        elif len(dense) == len(weights):
            parts = (_join(dense),)
        else:
            parts = tuple(kernels.pack_nf4([w]) if isinstance(w, Nf4Weight) else w for w in weights)
        widths = tuple(weight.shape[0] for weight in weights)
        return cls(parts, widths, _join_biases([linear.bias for linear in linears], widths), layer, group)

    @property
    def num_parameters(self) -> int:
        """Of the weights."""
        return sum(part.numel() if isinstance(part, Tensor) else part.num_parameters for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Of the weights, scales included."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """Base and adapters, `x Wᵢᵀ + bᵢ` plus the side paths, the projections side by side: [T, in] → [T, ΣN]."""
        y = _join([F.linear(x, p) if isinstance(p, Tensor) else kernels.nf4_linear(x, p) for p in self.parts], dim=-1)
        if self.bias is not None:
            y += self.bias
        if lora is not None and lora.segments:
            kernels.add_lora_(y, x, lora.arena, lora.table[self.layer, self.group], self.widths, lora.segments)
        return y


def _join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate; a single one is itself, not a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


def _join_biases(biases: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor | None:
    """One bias for the group; zeros for a projection that has none beside one that has."""
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    return _join([present[0].new_zeros(n) if bias is None else bias for bias, n in zip(biases, widths, strict=True)])
