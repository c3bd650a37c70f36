"""The adapter store: the one door to publish, resolve, roll back, remove and verify adapters.

    root/
      catalogue.sqlite3   names, versions, what is live, which base all this is for
      blobs/              one file per adapter, named by its sha256
      tokenizers/         the base's tokenizer, and one file per tokenizer that an adapter brought, named likewise
      staging/            what is not finished
      lock                held while a blob and the catalogue change together

A blob is renamed into place before the transaction that refers to it, and deleted after the one that no longer does; so
a crash can leave a blob too many, never one too few. Threads share one store; processes may each open the same root.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import regex

from .adapter import Adapter
from .base_layout import BaseLayout
from .base_vectors import BaseVectors
from .blob_folder import BlobFolder
from .blobs import file_digest, write_blob
from .catalogue import AdapterVersion, Catalogue
from .errors import AdapterError, AdapterNotFound, DigestMismatch, InvalidName, StoreError, UploadTooLarge
from .locks import exclusive
from .peft_format import ADAPTER_FILES, WEIGHTS_FILE, check_directory, parse
from .peft_tokenizer import read_own_tokenizer
from .staging import Staging
from .tokenizer_files import TOKENIZER_FILES
from .tokenizer_form import TokenizerForm, read_tokenizer_blob, write_tokenizer_blob

NAME = regex.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

DEFAULT_MAX_RANK = 256
DEFAULT_MAX_UPLOAD_BYTES = 1 << 30


@dataclass(frozen=True)
class DamagedVersion:
    """A version whose blob is not what the catalogue says."""

    version: AdapterVersion
    digest: str
    """Of the blob that it is about, the adapter's or its tokenizer's."""
    problem: Literal["missing", "changed"]


@dataclass(frozen=True)
class VerifyReport:
    """What `AdapterStore.verify` found, and what became of it."""

    versions_checked: int
    damaged: tuple[DamagedVersion, ...]
    orphaned_blobs: tuple[str, ...]
    """Files among the blobs that no version refers to and nobody is using."""
    left_overs: tuple[str, ...]
    """What killed processes left in staging."""
    repaired: bool
    now_live: dict[str, int | None] = field(default_factory=dict)
    """After a repair: the names whose live version was damaged, with the version live now; None if none was whole."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.damaged or self.orphaned_blobs or self.left_overs)


class AdapterStore:
    """All adapters of one base; use `AdapterStore.open`."""

    def __init__(
        self, root: Path, catalogue: Catalogue, *, base_directory: Path | None, max_rank: int, max_upload_bytes: int
    ) -> None:
        self.root = root
        self.max_rank = max_rank
        self.max_upload_bytes = max_upload_bytes
        self.layout = catalogue.layout
        self.base_name = catalogue.base_name
        self._base = BaseVectors(base_directory, bool(self.layout.is_tied)) if base_directory else None
        self._catalogue = catalogue
        self._lock = root / "lock"
        self._blobs = BlobFolder(root / "blobs", ".safetensors")
        self._tokenizers = BlobFolder(root / "tokenizers", ".json")
        self._staging = Staging(root / "staging", self._lock)

    @classmethod
    def open(
        cls,
        root: Path,
        layout: BaseLayout | None = None,
        *,
        base_name: str | None = None,
        base_tokenizer: TokenizerForm | None = None,
        base_directory: Path | None = None,
        max_rank: int = DEFAULT_MAX_RANK,
        max_upload_bytes: int = DEFAULT_MAX_UPLOAD_BYTES,
    ) -> "AdapterStore":
        """Open the store at `root`; given a base's layout and name, create it if it is not there.

        The base's tokenizer is remembered, for adapters that bring one are compared with it.
        With `base_directory`, where the base's checkpoint lies, embeddings and heads that were saved whole are kept as
        far as they differ from it.

        Raises:
            StoreError: it is damaged or for another base, or it is not there and no base was given.
        """
        root = root.absolute()
        catalogue_path = root / "catalogue.sqlite3"
        if not catalogue_path.exists() and (layout is None or base_name is None):
            raise StoreError(f"{root} is not an adapter store, and no base was given to create one for.")
        for folder in ("blobs", "tokenizers", "staging"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "lock").touch()
        with exclusive(root / "lock"):
            catalogue = Catalogue.open(catalogue_path, layout, base_name)
        store = cls(
            root, catalogue, base_directory=base_directory, max_rank=max_rank, max_upload_bytes=max_upload_bytes
        )
        if base_tokenizer is not None:
            store._remember_base_tokenizer(base_tokenizer)
        return store

    def close(self) -> None:
        """Close the catalogue's connections."""
        self._catalogue.close()

    def staging(self) -> AbstractContextManager[Path]:
        """A temporary directory inside the store, removed whatever happens; for an upload until it is published."""
        return self._staging.open()

    def publish(
        self,
        name: str,
        source: Path,
        *,
        expected_sha256: str | None = None,
        source_sha256: str | None = None,
        accept: Callable[[Adapter], None] | None = None,
    ) -> AdapterVersion:
        """Check a PEFT directory against the base and make it the next version of `name`, live at once.

        Args:
            name: 1 to 128 letters, digits, dots, underscores and hyphens, the first a letter or digit.
            source: The directory; one that is not in `staging()` is copied first, for a trainer may be rewriting it.
            expected_sha256: What the sender announced.
            source_sha256: The sha256 of what arrived; by default that of `adapter_model.safetensors`.
            accept: Called with the adapter before anything is kept; what it raises refuses the adapter.

        Raises:
            InvalidUpload: one of its kinds; nothing has changed and nothing is left behind.
            StoreError: the adapter brings a tokenizer, and the store has never been told the base's.
        """
        if not NAME.fullmatch(name):
            raise InvalidName(
                f"{name!r} cannot name an adapter: a name has 1 to 128 letters, digits, '.', '_' and '-', "
                "the first of them a letter or a digit."
            )
        with self.staging() as workspace:
            directory = self._take_in(source, workspace)
            source_sha256 = source_sha256 or file_digest(directory / WEIGHTS_FILE)
            if expected_sha256 is not None and expected_sha256.lower() != source_sha256:
                raise DigestMismatch(f"What arrived has sha256 {source_sha256}, but {expected_sha256} was announced.")
            adapter = parse(directory, self.layout, max_rank=self.max_rank, base=self._base)
            if accept is not None:
                accept(adapter)
            tokenizer = self._read_own_tokenizer(directory, adapter)
            blob = workspace / "blob"
            digest = write_blob(adapter, blob)
            with exclusive(self._lock):
                self._blobs.place(blob, digest)
                if tokenizer is not None:
                    self._place_tokenizer(tokenizer, workspace)
                return self._catalogue.add(name, adapter, digest, source_sha256, tokenizer)

    def resolve(self, name: str, version: int | None = None) -> AdapterVersion:
        """The live version of a name, or the one asked for.

        Raises:
            AdapterNotFound, VersionNotFound: there is none.
        """
        return self._catalogue.resolve(name, version)

    def list_adapters(self) -> list[AdapterVersion]:
        """The live version of every adapter, by name."""
        return self._catalogue.live_versions()

    def versions(self, name: str) -> list[AdapterVersion]:
        """All versions of a name, oldest first.

        Raises:
            AdapterNotFound: there is no such name.
        """
        versions = self._catalogue.versions(name)
        if not versions:
            raise AdapterNotFound(f"There is no adapter {name}.")
        return versions

    def is_live(self, digest: str) -> bool:
        """Whether this digest is the live version of any name: the same adapter may have several."""
        return self._catalogue.is_live(digest)

    def rollback(self, name: str, version: int | None = None) -> AdapterVersion:
        """Make an older (or any other) version live; by default the highest one below the live one.

        Raises:
            AdapterNotFound, VersionNotFound: there is none.
        """
        return self._catalogue.rollback(name, version)

    def remove(self, name: str) -> list[AdapterVersion]:
        """Remove a name with all its versions, which are returned; blobs go once nobody leases or refers to them.

        Raises:
            AdapterNotFound: there is no such name.
        """
        with exclusive(self._lock):
            removed = self._catalogue.remove(name)
            wanted = self._catalogue.digests()
            for version in removed:
                for digest, (folder, path) in self._files(version).items():
                    if digest not in wanted:
                        folder.discard(path)
            return removed

    def blob_path(self, digest: str) -> Path:
        """Where the blob of this digest lies."""
        return self._blobs.path(digest)

    @property
    def base_tokenizer(self) -> TokenizerForm | None:
        """The base's tokenizer as it was when the store was last opened with it; None if it never was."""
        digest = self._catalogue.base_tokenizer
        return None if digest is None else self.read_tokenizer(digest)

    def read_tokenizer(self, digest: str) -> TokenizerForm:
        """The tokenizer of this digest, which a version names.

        Raises:
            AdapterNotFound: the versions that named it have been removed.
            StoreError: it is missing or damaged.
        """
        try:
            return read_tokenizer_blob(self._tokenizers.path(digest))
        except FileNotFoundError as error:
            raise self._missing(digest) from error

    @contextmanager
    def lease(self, digest: str) -> Iterator[Path]:
        """Keep a blob on disk although its adapter may be removed meanwhile, by whatever process.

        Raises:
            AdapterNotFound: the adapter has been removed.
            StoreError: the adapter is published, but its blob is missing.
        """
        try:
            self._blobs.acquire(digest)
        except FileNotFoundError as error:
            raise self._missing(digest) from error
        try:
            yield self.blob_path(digest)
        finally:
            # a remove during the lease could not delete the blob, so the last lease does
            if self._blobs.release(digest) and not self._catalogue.refers_to(digest):
                with exclusive(self._lock):
                    if not self._catalogue.refers_to(digest):
                        self._blobs.discard(self.blob_path(digest))

    def verify(self, repair: bool = False) -> VerifyReport:
        """Hold every blob against the catalogue, and look for what killed processes left behind.

        With `repair`, orphaned blobs and left-overs are deleted and versions without their whole blob are dropped;
        where such a version was live, the newest whole one becomes live.
        """
        versions = self._catalogue.all_versions()
        files = {digest: path for version in versions for digest, (_, path) in self._files(version).items()}
        suspects = {digest: path for digest, path in files.items() if _problem(digest, path)}
        with exclusive(self._lock):
            # looked at once more, for a publish or a remove may have come between
            problems = {digest: problem for digest, path in suspects.items() if (problem := _problem(digest, path))}
            damaged = tuple(
                DamagedVersion(version, digest, problems[digest])
                for version in self._catalogue.all_versions()
                for digest in self._files(version)
                if digest in problems
            )
            now_live = self._catalogue.drop_blobs(problems) if repair and damaged else {}
            wanted = self._catalogue.digests()
            orphans = [(folder, path) for folder in (self._blobs, self._tokenizers) for path in folder.unused(wanted)]
            left_overs = self._staging.left_overs()
            if repair:
                for folder, path in orphans:
                    folder.discard(path)
                for path in left_overs:
                    shutil.rmtree(path)
        return VerifyReport(
            versions_checked=len(versions),
            damaged=damaged,
            orphaned_blobs=tuple(path.name for _, path in orphans),
            left_overs=tuple(path.name for path in left_overs),
            repaired=repair,
            now_live=now_live,
        )

    def _missing(self, digest: str) -> AdapterError:
        if self._catalogue.refers_to(digest):
            return StoreError(f"Blob {digest} is missing. Run `onebase adapters verify --repair`, then publish again.")
        return AdapterNotFound(f"The adapter with digest {digest} has been removed.")

    def _files(self, version: AdapterVersion) -> dict[str, tuple[BlobFolder, Path]]:
        """A version's blobs by their digests: the adapter's, and its tokenizer's if it brought one."""
        files = {version.digest: (self._blobs, self._blobs.path(version.digest))}
        if version.tokenizer_digest is not None:
            files[version.tokenizer_digest] = (self._tokenizers, self._tokenizers.path(version.tokenizer_digest))
        return files

    def _read_own_tokenizer(self, directory: Path, adapter: Adapter) -> TokenizerForm | None:
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            return None
        base = self.base_tokenizer
        if base is None:
            raise StoreError(
                "The adapter brings tokenizer files, which have to be compared with those of the base, and this store "
                f"has not seen them yet: give the directory of {self.base_name}, or let a server open the store first."
            )
        return read_own_tokenizer(directory, adapter, self.layout, base)

    def _place_tokenizer(self, form: TokenizerForm, workspace: Path) -> None:
        """Put a form among the tokenizers; the caller holds the lock."""
        file = workspace / "tokenizer"
        write_tokenizer_blob(form, file)
        self._tokenizers.place(file, form.digest)

    def _remember_base_tokenizer(self, form: TokenizerForm) -> None:
        before = self._catalogue.base_tokenizer
        if form.digest == before and self._tokenizers.path(before).exists():
            return
        with self.staging() as workspace, exclusive(self._lock):
            self._place_tokenizer(form, workspace)
            self._catalogue.remember_base_tokenizer(form.digest)
            if before is not None and before not in self._catalogue.digests():
                self._tokenizers.discard(self._tokenizers.path(before))

    def _take_in(self, source: Path, workspace: Path) -> Path:
        """The directory to read: the source itself if it is in staging, else a copy that nobody else can change."""
        check_directory(source)
        files = [file for name in ADAPTER_FILES if (file := source / name).is_file()]
        size = sum(file.stat().st_size for file in files)
        if size > self.max_upload_bytes:
            raise UploadTooLarge(f"The adapter has {size} bytes; this server allows at most {self.max_upload_bytes}.")
        if source.absolute().is_relative_to(self._staging.directory):
            return source
        for file in files:
            shutil.copyfile(file, workspace / file.name)
        return workspace


def _problem(digest: str, path: Path) -> Literal["missing", "changed"] | None:
    try:
        return None if file_digest(path) == digest else "changed"
    except FileNotFoundError:
        return "missing"
