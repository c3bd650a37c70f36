"""Memory for what stays and is read at every step: weights and adapters, in huge pages where the system has them.

A page of 2 MiB instead of 4 KiB spares the lookups of addresses that otherwise cost a tenth to a fifth of the memory's
bandwidth, more on a virtual machine. It knows nothing of what it holds.
"""

import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_CHUNK_BYTES = 64 << 20
"""Reserved at a time; what nobody writes to costs nothing."""
_ALIGNMENT = 64


class _Chunk:
    """Memory that is handed out once, from its beginning on."""

    def __init__(self, nbytes: int) -> None:
        mapping = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping
        start = -whole.data_ptr() % _HUGE_PAGE
        self._memory = whole[start : start + nbytes]
        self._used = 0

    def take(self, nbytes: int) -> Tensor | None:
        """So many bytes; None if there are no longer as many."""
        if self._used + nbytes > self._memory.numel():
            return None
        taken = self._memory[self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return taken


_lock = threading.Lock()
_current = _Chunk(0)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, on the CPU. Large tensors have memory of their own; small ones lie side by side."""
    global _current
    nbytes = math.prod(shape) * dtype.itemsize
    with _lock:
        taken = None if nbytes > _CHUNK_BYTES // 2 else _current.take(nbytes)
        if taken is None:
            chunk = _Chunk(max(nbytes, _CHUNK_BYTES))
            taken = chunk.take(nbytes)
            if nbytes <= _CHUNK_BYTES // 2:
                _current = chunk
    assert taken is not None, "a chunk is made as large as what is asked for"
    return taken.view(dtype).view(tuple(shape))


def resident(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in such memory."""
    return empty(tensor.shape, tensor.dtype).copy_(tensor)
