"""From what a request is pinned to, to a packed adapter: blobs that one recipe made are laid out by one plan.

Adapters of the same ranks, targets and dtype differ in their numbers alone. What it takes to read and lay out the first
of them, several hundred matrices in Python, serves the next ones, which are one call of the kernels each.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_adapters.blobs import map_blob, parse_blob
from onebase_kernels import FileMatrix, FilePlan, Matrix
from onebase_server.engine.adapter_reading import read_adapter
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.packing import Layout, PackedAdapter, lay_out, pack_adapter
from onebase_server.engine.request import AdapterRef
from onebase_server.model.config import ModelConfig
from onebase_server.model.linear import LinearGroup

MAX_RECIPES = 64
"""Plans that are kept, of some hundred KB each."""


@dataclass(frozen=True, slots=True)
class _BlobPlan:
    """How all blobs of a recipe are laid out."""

    matrices: FilePlan
    num_numbers: int
    table: Tensor

    def pack(self, file: Tensor, dtype: torch.dtype) -> PackedAdapter:
        numbers = torch.empty(self.num_numbers, dtype=dtype)
        kernels.copy_file_matrices_(numbers, file, self.matrices)
        return PackedAdapter(numbers, self.table)


class BlobPacker:
    """Packs adapters for one base and one format of matrices, on one thread."""

    def __init__(self, config: ModelConfig, matrix_format: MatrixFormat, base: Sequence[LinearGroup]) -> None:
        """`base` as `packing.lay_out` takes it."""
        self._config = config
        self._format = matrix_format
        self._base = base
        self._plans: OrderedDict[tuple[bytes, int], _BlobPlan] = OrderedDict()  # least recently used first

    def pack(self, ref: AdapterRef) -> PackedAdapter:
        """The adapter in the kernels' layout; raises as `adapter_reading.read_adapter`."""
        if ref.is_combination:
            return pack_adapter(read_adapter(ref), self._config, self._format, self._base)
        blob = map_blob(Path(ref.parts[0].path))
        file = torch.frombuffer(blob.data, dtype=torch.uint8)
        recipe = blob.header, len(file)
        plan = self._plans.get(recipe)
        if plan is None:
            adapter = parse_blob(blob)
            if adapter.epilogues or adapter.vocabulary or adapter.norms:  # which are more than copies of matrices
                return pack_adapter(adapter, self._config, self._format, self._base)
            plan = self._plans[recipe] = _plan(lay_out(adapter, self._config, self._format, self._base), file)
            if len(self._plans) > MAX_RECIPES:
                self._plans.popitem(last=False)
        self._plans.move_to_end(recipe)
        return plan.pack(file, self._format.dtype)


def _plan(layout: Layout, file: Tensor) -> _BlobPlan:
    """The layout of an adapter whose matrices are views of the file."""

    def in_file(matrix: Matrix) -> FileMatrix:
        source, offset, scale, is_transposed, scales = matrix
        rows, columns = source.shape
        start = source.data_ptr() - file.data_ptr()
        return FileMatrix(start, rows, columns, source.dtype, offset, scale, is_transposed, scales)

    return _BlobPlan(FilePlan(tuple(map(in_file, layout.matrices))), layout.num_numbers, layout.table)
