"""An adapter's matrices on their way to the arena: ops of the back end, of one call each for all matrices.

It knows nothing of adapters and blobs.
"""

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from onebase_kernels import reference
from onebase_kernels.batch import FilePlan, Matrix
from onebase_kernels.cpu import calls, execution
from onebase_kernels.cpu.calls import DTYPES
from onebase_kernels.cpu.execution import are_plain

_READ = {**DTYPES, torch.float16: calls.FLOAT16}
"""What `copy_matrices_` and `copy_file_matrices_` read."""
_FILE_MATRICES: WeakKeyDictionary[FilePlan, "ctypes.Array[calls.Matrix]"] = WeakKeyDictionary()
"""Of the plans that somebody keeps."""


def copy_matrices_(target: Tensor, matrices: Sequence[Matrix]) -> None:
    """As `reference.copy_matrices_`, in one call, during which other threads may compute."""
    sources = [matrix.source for matrix in matrices]
    if target.dtype not in DTYPES or not are_plain(target, *sources) or any(x.dtype not in _READ for x in sources):
        reference.copy_matrices_(target, matrices)
        return
    array = (calls.Matrix * len(matrices))(
        *(
            calls.Matrix(
                source.data_ptr(), *source.shape, offset, scale, _READ[source.dtype], is_transposed, _scales(scales)
            )
            for source, offset, scale, is_transposed, scales in matrices
        )
    )
    _copy_matrices(target, 0, array)


def copy_file_matrices_(target: Tensor, file: Tensor, plan: FilePlan) -> None:
    """As `reference.copy_file_matrices_`, in one call that is worked out once for a plan."""
    is_read = all(matrix.dtype in _READ for matrix in plan.matrices)
    if target.dtype not in DTYPES or not are_plain(target, file) or not is_read:
        reference.copy_file_matrices_(target, file, plan)
        return
    _copy_matrices(target, file.data_ptr(), _file_matrices(plan))


def _file_matrices(plan: FilePlan) -> "ctypes.Array[calls.Matrix]":
    if plan not in _FILE_MATRICES:
        _FILE_MATRICES[plan] = (calls.Matrix * len(plan.matrices))(
            *(
                calls.Matrix(start, rows, columns, offset, scale, _READ[dtype], is_transposed, _scales(scales))
                for start, rows, columns, dtype, offset, scale, is_transposed, scales in plan.matrices
            )
        )
    return _FILE_MATRICES[plan]


def _copy_matrices(target: Tensor, base: int, matrices: "ctypes.Array[calls.Matrix]") -> None:
    """`base` is the address that sources are counted from."""
    execution.library.onebase_copy_matrices(
        ctypes.byref(matrices), len(matrices), base, target.data_ptr(), DTYPES[target.dtype]
    )


def _scales(offset: int | None) -> int:
    """As copy_matrices.cpp has it."""
    return -1 if offset is None else offset
