"""The folder of blobs: which are there, which are in use by a thread or process, and how one comes and goes.

What is in a blob is `blobs`'s business, and whether one is still wanted the catalogue's. `place` and `discard` expect
their caller to hold the store's lock.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from .adapter import AdapterNotFound
from .blobs import file_digest, sync
from .locks import exclusive_if_free, is_locked, lock_shared

SUFFIX = ".safetensors"


class BlobFolder:
    """Blobs named by their digest, each leased by any number of threads and processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._mutex = Lock()
        self._leases: dict[str, tuple[int, int]] = {}
        """Digest to the descriptor that holds this process's shared lock, and how many leases share it."""

    def __repr__(self) -> str:
        return (
            f"BlobFolder({self.directory}, leased={ {digest: count for digest, (_, count) in self._leases.items()} })"
        )

    def path(self, digest: str) -> Path:
        """Where the blob of this digest lies, or would lie."""
        return self.directory / f"{digest}{SUFFIX}"

    def unused(self, wanted: Collection[str]) -> list[Path]:
        """Files of the folder that are not wanted blobs and that nobody leases; the caller holds the store's lock."""
        wanted_paths = {self.path(digest) for digest in wanted}
        return [path for path in sorted(self.directory.iterdir()) if path not in wanted_paths and not is_locked(path)]

    def place(self, file: Path, digest: str) -> None:
        """Rename a finished blob, already on the disk, into the folder, so that a crash finds all of it or nothing."""
        path = self.path(digest)
        if path.exists() and file_digest(path) == digest:
            return  # the leases on the one that is there have to go on holding it
        os.replace(file, path)
        sync(self.directory)

    def discard(self, digest: str) -> None:
        """Delete a blob, if it is there, unless someone leases it, in whatever process."""
        path = self.path(digest)
        with suppress(FileNotFoundError), exclusive_if_free(path) as is_free:
            if is_free:
                path.unlink()

    @contextmanager
    def lease(self, digest: str) -> Iterator[Path]:
        """Keep a blob from being discarded.

        Raises:
            AdapterNotFound: the blob is not there, or went while the lease was being taken.
        """
        with self._mutex:
            descriptor, count = self._leases.get(digest) or (self._lock(digest), 0)
            self._leases[digest] = (descriptor, count + 1)
        try:
            yield self.path(digest)
        finally:
            with self._mutex:
                descriptor, count = self._leases.pop(digest)
                if count > 1:
                    self._leases[digest] = (descriptor, count - 1)
                else:
                    os.close(descriptor)

    def is_leased_here(self, digest: str) -> bool:
        """Whether a thread of this process leases the blob."""
        with self._mutex:
            return digest in self._leases

    def _lock(self, digest: str) -> int:
        try:
            descriptor = lock_shared(self.path(digest))
        except FileNotFoundError:
            raise AdapterNotFound(f"The adapter with digest {digest} has been removed.") from None
        if os.fstat(descriptor).st_nlink == 0:  # deleted between open and lock
            os.close(descriptor)
            raise AdapterNotFound(f"The adapter with digest {digest} has been removed.")
        return descriptor
