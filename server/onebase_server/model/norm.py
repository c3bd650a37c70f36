"""The norms of a base: their weights, and the ops that they are."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

import onebase_kernels as kernels


@dataclass(frozen=True)
class RmsNorm:
    """RMS norm (arXiv 1910.07467)."""

    weight: Tensor
    """[size]."""
    eps: float

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        return self.weight.nbytes


@dataclass(frozen=True)
class LayerNorm:
    """Layer norm (arXiv 1607.06450)."""

    weight: Tensor
    """[size], as the bias."""
    bias: Tensor
    eps: float

    @property
    def nbytes(self) -> int:
        """Of weight and bias."""
        return self.weight.nbytes + self.bias.nbytes


class OwnNorm(NamedTuple):
    """What rows `start:stop` of a step have in place of the base's norm."""

    start: int
    stop: int
    norm: RmsNorm | LayerNorm


@dataclass(frozen=True)
class MixedNorm:
    """A norm of the base in a step in which adapters replace it for some rows."""

    base: RmsNorm | LayerNorm
    own: tuple[OwnNorm, ...]

    @property
    def weight(self) -> Tensor:
        """The base's; all are of one size."""
        return self.base.weight

    @property
    def nbytes(self) -> int:
        """Of the base's; the others are the adapters'."""
        return self.base.nbytes


Norm = RmsNorm | LayerNorm | MixedNorm


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm of x [T, size], or of each x[t, i] of x [T, rows, size]; x itself where there is no norm."""
    match norm:
        case None:
            return x
        case RmsNorm():
            return kernels.rms_norm(x, norm.weight, norm.eps)
        case LayerNorm():
            return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
        case MixedNorm():
            y = normalize(x, norm.base)
            for start, stop, own in norm.own:
                y[start:stop] = normalize(x[start:stop], own)
            return y


def normalize_heads(heads: Tensor, norm: Norm | None) -> Tensor:
    """Of [T, H, D]: each head by itself where the norm's size is D, a token's heads as one row where it is H · D."""
    if norm is None:
        return heads
    return normalize(heads.view(heads.shape[0], -1, norm.weight.shape[0]), norm).view(heads.shape)


def add_and_normalize_(hidden: Tensor, delta: Tensor, scale: float, norm: Norm | None) -> Tensor:
    """`hidden += scale · delta` in place, both [T, size]; then as `normalize` of hidden."""
    if isinstance(norm, RmsNorm) and scale == 1:
        return kernels.add_rms_norm_(hidden, delta, norm.weight, norm.eps)
    kernels.add_(hidden, delta, scale)
    return normalize(hidden, norm)
