"""Advisory locks on files, between threads and between processes; the kernel lets go of those of a killed process.

flock(2) locks an open file, not a path or a process: every open of a path is a holder of its own, threads included.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def lock_shared(path: Path) -> int:
    """Open a file and wait for a shared lock on it; closing the returned descriptor lets go."""
    return _open_locked(path, fcntl.LOCK_SH)


def lock_exclusive(path: Path) -> int:
    """Open a file or directory and wait for the only lock on it; closing the returned descriptor lets go."""
    return _open_locked(path, fcntl.LOCK_EX)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the only lock on a file."""
    descriptor = lock_exclusive(path)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_if_free(path: Path) -> Iterator[bool]:
    """Hold the only lock on a file or directory if nobody else holds one, and say whether; never waits."""
    try:
        descriptor = _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether anyone holds a lock on a file or directory at this moment."""
    with exclusive_if_free(path) as is_free:
        return not is_free


def _open_locked(path: Path, operation: int) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, operation)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
