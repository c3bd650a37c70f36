"""This process's resident memory, as Linux counts it: how much there is, and giving back what is free.

A leaf: it knows bytes, not what they are for.
"""

import ctypes
import os
from functools import cache

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_STATM_BYTES = 256
"""More than its seven numbers take."""


def resident_bytes() -> int:
    """Bytes of this process that are in physical memory, pages that it shares with others included (its RSS)."""
    return int(os.pread(_statm(), _STATM_BYTES, 0).split()[1]) * _PAGE_SIZE


@cache
def _statm() -> int:
    """The file that counts pages, kept open: the engine asks after every step, and opening costs more than reading."""
    return os.open("/proc/self/statm", os.O_RDONLY)


def return_free_memory() -> None:
    """Give the system back what was freed, which glibc keeps in case it is wanted again; elsewhere, do nothing.

    Worth it once, after loading: reading a tokenizer or packing weights leaves 15 to 30 MiB that nothing uses later.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
