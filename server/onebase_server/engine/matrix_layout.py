"""Matrices behind each other in an adapter's run of numbers: where each is to be copied, and found again."""

from typing import NamedTuple

import torch
from torch import Tensor

from onebase_kernels import Matrix


class Part(NamedTuple):
    """A matrix or vector among an adapter's numbers."""

    start: int
    shape: torch.Size

    def of(self, numbers: Tensor) -> Tensor:
        """The matrix itself."""
        return numbers[self.start : self.start + self.shape.numel()].view(self.shape)


class MatrixWriter:
    """Puts matrices behind each other."""

    def __init__(self, matrices: list[Matrix], start: int) -> None:
        """What is put is added to `matrices`; the first begins at the number `start`."""
        self._matrices = matrices
        self._end = start

    @property
    def end(self) -> int:
        """The number behind the last matrix."""
        return self._end

    def put(self, source: Tensor, *, scale: float = 1.0, is_transposed: bool = False) -> Part:
        """Take in a matrix, or a vector, on the host."""
        matrix = source if source.ndim == 2 else source.unsqueeze(0)
        part = Part(self._end, torch.Size(reversed(source.shape)) if is_transposed else source.shape)
        self._matrices.append(Matrix(matrix, part.start, scale, is_transposed))
        self._end += source.numel()
        return part
