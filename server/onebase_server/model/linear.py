"""The base's linears in their projection groups, with the adapters of the step beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import LoraBatch, PackedWeights, QuantizedWeight, dequantize


class Linear(NamedTuple):
    """One projection as a checkpoint has it."""

    weight: QuantizedWeight | Tensor
    """[out, in]."""
    bias: Tensor | None
    """[out]."""


@dataclass(frozen=True)
class LinearGroup:
    """The linears of one projection group of one layer, and its place in the adapters' table."""

    parts: tuple[PackedWeights | Tensor, ...]
    """Usually one: all projections together, quantised or dense [ΣN, in]; one each where a checkpoint mixes the two."""
    widths: tuple[int, ...]
    """Output features of each projection."""
    bias: Tensor | None
    """[ΣN]."""
    place: int
    """Of this group in the adapters' table."""

    @classmethod
    def build(cls, linears: Sequence[Linear], widths: tuple[int, ...], place: int) -> "LinearGroup":
        """Put a group's linears side by side, one of each projection or one of all.

        Weights are packed for the back end that was chosen.
        """
        weights = [linear.weight for linear in linears]
        quantised = [weight for weight in weights if not isinstance(weight, Tensor)]
        dense = [weight for weight in weights if isinstance(weight, Tensor)]
        if len(quantised) == len(weights):
            parts: tuple[PackedWeights | Tensor, ...] = (kernels.pack_quantized(quantised),)
        elif len(dense) == len(weights):
            parts = (kernels.pack_dense(_join(dense)),)
        else:
            parts = tuple(
                kernels.pack_dense(weight) if isinstance(weight, Tensor) else kernels.pack_quantized([weight])
                for weight in weights
            )
        return cls(parts, widths, _join_biases(linears), place)

    def weight(self, index: int) -> Tensor:
        """One projection's weight in fp32, [N, in], out of what the back end packed."""
        dense = torch.cat([_dequantize(part) for part in self.parts])
        return torch.split(dense, list(self.widths))[index]

    @property
    def num_parameters(self) -> int:
        """Of the weights."""
        return sum(part.numel() if isinstance(part, Tensor) else part.num_parameters for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Of the weights, scales included."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """Base and adapters, `x Wᵢᵀ + bᵢ` plus the side paths, the projections side by side: [T, in] → [T, ΣN].

        None is a step in which no adapter touches the group; a recorded step never says so.
        """
        if lora is None:
            return self._base(x)
        started = kernels.start_lora(x, lora, self.place, self.widths)
        y = self._base(x)
        kernels.add_lora_(y, x, lora, self.place, self.widths, started)
        return y

    def _base(self, x: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return _linear(x, self.parts[0], self.bias)
        joined = torch.cat([_linear(x, part, None) for part in self.parts], dim=-1)
        return joined if self.bias is None else joined + self.bias


def _linear(x: Tensor, weight: PackedWeights | Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor):
        return kernels.dense_linear(x, weight, bias)
    return kernels.quantized_linear(x, weight, bias)


def _dequantize(part: PackedWeights | Tensor) -> Tensor:
    """fp32 [ΣN, in]."""
    if isinstance(part, Tensor):
        return part.float()
    return torch.cat([dequantize(weight, torch.float32) for weight in kernels.unpack_quantized(part)])


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate; a single one is itself, not a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _join_biases(linears: Sequence[Linear]) -> Tensor | None:
    """One bias for the group; zeros for a linear that has none beside one that has."""
    present = [linear.bias for linear in linears if linear.bias is not None]
    if not present:
        return None
    return _join([present[0].new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in linears])
