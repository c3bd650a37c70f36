"""Temporary directories inside the store, for uploads and blobs that are not finished.

Each is locked while its process lives, so that what a killed process left behind can be told from what is in use.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .locks import exclusive, is_locked, lock_exclusive


class Staging:
    """The folder of temporary directories; `lock` is the store's, and guards making and clearing them."""

    def __init__(self, directory: Path, lock: Path) -> None:
        self.directory = directory
        self._lock = lock

    @contextmanager
    def open(self) -> Iterator[Path]:
        """A new temporary directory, removed whatever happens."""
        with exclusive(self._lock):  # else `left_overs` could take it for one between its making and its locking
            path = Path(tempfile.mkdtemp(dir=self.directory))
            descriptor = lock_exclusive(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def left_overs(self) -> list[Path]:
        """What no living process is using; the caller holds the store's lock."""
        return [path for path in sorted(self.directory.iterdir()) if path.is_dir() and not is_locked(path)]
