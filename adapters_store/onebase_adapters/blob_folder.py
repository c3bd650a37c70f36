"""The folder of blobs: which are there, which are in use by a thread or process, and how one comes and goes.

What is in a blob is `blobs`'s business, and whether one is still wanted the catalogue's. `place` and `discard` expect
their caller to hold the store's lock.
"""

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from threading import Lock

from .blobs import file_digest, sync
from .locks import exclusive_if_free, is_locked, lock_shared


class BlobFolder:
    """Blobs named by their digest, each leased by any number of threads and processes."""

    def __init__(self, directory: Path, suffix: str) -> None:
        self.directory = directory
        self._suffix = suffix
        self._mutex = Lock()
        self._leases: dict[str, tuple[int, int]] = {}
        """Digest to the descriptor that holds this process's shared lock, and how many leases share it."""

    def __repr__(self) -> str:
        return (
            f"BlobFolder({self.directory}, leased={ {digest: count for digest, (_, count) in self._leases.items()} })"
        )

    def path(self, digest: str) -> Path:
        """Where the blob of this digest lies, or would lie."""
        return self.directory / f"{digest}{self._suffix}"

    def unused(self, wanted: Collection[str]) -> list[Path]:
        """Files of the folder that are not wanted blobs and that nobody leases; the caller holds the store's lock."""
        unwanted = set(self.directory.iterdir()) - {self.path(digest) for digest in wanted}
        return [path for path in sorted(unwanted) if path.is_file() and not is_locked(path)]

    def place(self, file: Path, digest: str) -> None:
        """Rename a finished blob, already on the disk, into the folder, so that a crash finds all of it or nothing."""
        path = self.path(digest)
        if path.exists() and file_digest(path) == digest:
            return  # the leases on the one that is there have to go on holding it
        os.replace(file, path)
        sync(self.directory)

    def discard(self, path: Path) -> None:
        """Delete a file of the folder, if it is there, unless someone leases it, in whatever process."""
        with suppress(FileNotFoundError), exclusive_if_free(path) as is_free:
            if is_free:
                path.unlink()

    def acquire(self, digest: str) -> None:
        """Begin a lease: until its `release`, nobody can discard the blob.

        Raises:
            FileNotFoundError: it is not there, or went while the lease was being taken.
        """
        with self._mutex:
            descriptor, count = self._leases.get(digest) or (self._lock(digest), 0)
            self._leases[digest] = (descriptor, count + 1)

    def release(self, digest: str) -> bool:
        """End a lease, and say whether it was the last one of this process."""
        with self._mutex:
            descriptor, count = self._leases.pop(digest)
            if count > 1:
                self._leases[digest] = (descriptor, count - 1)
                return False
            os.close(descriptor)
            return True

    def _lock(self, digest: str) -> int:
        path = self.path(digest)
        descriptor = lock_shared(path)
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            raise FileNotFoundError(f"{path} was deleted between its opening and its locking.")
        return descriptor
