"""The base's linears in their projection groups, with the adapters of the step beside them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

import onebase_kernels as kernels
from onebase_kernels import Nf4Weight, Segment


@dataclass(frozen=True)
class LoraBatch:
    """Which rows of the step use which adapter, and where the adapters lie; `onebase_kernels.add_lora_` says how."""

    arena: Tensor
    """[E], in the compute dtype: the numbers of all adapters in device memory."""
    table: Tensor
    """int64 [layers, groups, slots, 4]: per layer and projection group, each slot's `(offset, r₀, r₁, r₂)`."""
    segments: tuple[Segment, ...]
    """Rows without an adapter are in no segment."""


@dataclass(frozen=True)
class Linear:
    """One projection of the base, quantised or not."""

    weight: Nf4Weight | Tensor
    """[out, in]."""
    bias: Tensor | None = None
    """[out]."""

    @property
    def out_features(self) -> int:
        """Columns of the output."""
        return self.weight.shape[0]

    @property
    def num_parameters(self) -> int:
        """Of the weight."""
        return self.weight.shape[0] * self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """`x Wᵀ + b`: [T, in] → [T, out]."""
        if isinstance(self.weight, Nf4Weight):
            return kernels.nf4_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class LinearGroup:
    """The linears of one projection group of one layer, and its place in the adapters' table."""

    linears: tuple[Linear, ...]
    layer: int
    group: int

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Output features of each linear."""
        return tuple(linear.out_features for linear in self.linears)

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """Base and adapters, the linears side by side: [T, in] → [T, Σ out]."""
        outputs = [linear(x) for linear in self.linears]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if lora is not None and lora.segments:
            kernels.add_lora_(y, x, lora.arena, lora.table[self.layer, self.group], self.widths, lora.segments)
        return y
