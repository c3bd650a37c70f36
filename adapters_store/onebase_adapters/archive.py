"""An uploaded archive to a PEFT directory: zip, tar or tar.gz, none of which is trusted.

Only the files that make an adapter and its tokenizer are written, under their plain names, so nothing that a member's
name says can lead out of the directory; a suspicious member is refused all the same. It knows nothing of what is in the
files.
"""

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING

from .errors import InvalidArchive, UploadTooLarge
from .peft_config import CONFIG_FILE
from .peft_format import ADAPTER_FILES, WEIGHTS_FILE, require_files

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_FILES = 1000
"""Most members of an archive: an adapter with its tokenizer and a few checkpoints has tens."""

MAX_ZIP_DIRECTORY_BYTES = 4 << 20
"""Largest list of members of a zip, far more than MAX_FILES take."""

CHUNK_BYTES = 1 << 20

Open = Callable[[], IO[bytes] | None]


@dataclass(frozen=True)
class _Member:
    """One entry of an archive."""

    name: str
    is_regular: bool
    is_directory: bool
    open: Open


def unpack(archive: Path, directory: Path, *, max_bytes: int, max_files: int = MAX_FILES) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and the tokenizer's files into an existing directory.

    They are taken from the archive's root, or from its one sub-folder that has the first two; others are ignored.

    Raises:
        InvalidArchive: not an archive, damaged, encrypted, or it holds a path that leaves it, a link or a device.
        UploadTooLarge: more than `max_files` members, or more than `max_bytes` bytes unpacked.
        InvalidConfig, InvalidTensors: one of the two files is missing.
    """
    try:
        opened = _open_zip if _starts_with(archive, b"PK") else _open_tar
        with opened(archive, max_bytes) as members:
            names = _check(members, max_files)
        chosen = _choose(names)
        with opened(archive, max_bytes) as members:
            _extract(members, chosen, directory, max_bytes)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,  # a truncated gzip
        RuntimeError,  # an encrypted zip
        UnicodeError,
    ) as error:
        raise InvalidArchive(f"The upload is not an intact zip, tar or tar.gz archive: {error}.") from error


def _check(members: Iterator[_Member], max_files: int) -> set[str]:
    """Refuse suspicious members, the ignored ones too; return the names of the regular files."""
    names: set[str] = set()
    for count, member in enumerate(members, start=1):
        if count > max_files:
            raise UploadTooLarge(f"The archive has more than {max_files} files.")
        if not member.name or PureWindowsPath(member.name).anchor or "\\" in member.name or "\0" in member.name:
            raise InvalidArchive(f"The archive holds {member.name!r}, which is not a plain relative path.")
        if ".." in PurePosixPath(member.name).parts:
            raise InvalidArchive(f"The archive holds {member.name!r}, which leads out of it.")
        if member.is_directory:
            continue
        if not member.is_regular:
            raise InvalidArchive(f"The archive holds {member.name!r}, which is a link or a device, not a file.")
        name = str(PurePosixPath(member.name))
        if name in names:
            raise InvalidArchive(f"The archive holds {name!r} twice.")
        names.add(name)
    return names


def _choose(names: set[str]) -> dict[str, str]:
    """The paths that the wanted files have or would have, with the plain name that each is written under."""
    if CONFIG_FILE in names or WEIGHTS_FILE in names:
        folder = PurePosixPath()
    else:
        paths = [PurePosixPath(name) for name in sorted(names)]
        folders = {path.parent for path in paths if path.name in (CONFIG_FILE, WEIGHTS_FILE) and len(path.parts) == 2}
        if len(folders) > 1:
            raise InvalidArchive(
                f"The archive holds several adapters, in {sorted(map(str, folders))}; upload one at a time."
            )
        folder = folders.pop() if folders else PurePosixPath()
    require_files([PurePosixPath(name).name for name in names if PurePosixPath(name).parent == folder])
    return {str(folder / name): name for name in ADAPTER_FILES}


def _extract(members: Iterator[_Member], chosen: dict[str, str], directory: Path, max_bytes: int) -> None:
    room = max_bytes
    for member in members:
        name = chosen.get(str(PurePosixPath(member.name)))
        source = member.open() if name and member.is_regular else None
        if name and source:
            with source, (directory / name).open("wb") as target:
                room = _copy(source, target, room, max_bytes)


def _copy(source: IO[bytes], target: IO[bytes], room: int, max_bytes: int) -> int:
    """Copy at most `room` bytes, whatever size the archive declares, and return how much room is left."""
    while chunk := source.read(CHUNK_BYTES):
        room -= len(chunk)
        if room < 0:
            raise _too_large(max_bytes)
        target.write(chunk)
    return room


def _too_large(max_bytes: int) -> UploadTooLarge:
    return UploadTooLarge(f"The archive unpacks to more than {max_bytes} bytes, the most that this server allows.")


@contextmanager
def _open_zip(archive: Path, max_bytes: int) -> Iterator[Iterator[_Member]]:
    with _ZipSource(archive) as source, zipfile.ZipFile(source) as file:
        yield (_zip_member(file, info) for info in file.infolist())


def _zip_member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    name = info.orig_filename  # ZipInfo.filename is cut at a zero byte
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidArchive(f"The archive holds {name!r} in a compression other than deflate.")
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the zip was not made on Unix
    return _Member(
        name=name,
        is_regular=kind in (0, stat.S_IFREG),
        is_directory=kind in (0, stat.S_IFDIR) and name.endswith("/"),
        open=lambda: file.open(info),
    )


class _ZipSource(io.FileIO):
    """A zip that cannot make `zipfile` read its list of members, however long, into memory at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_ZIP_DIRECTORY_BYTES:
            raise UploadTooLarge("The archive's list of files is too long.")
        return super().read(size) or b""


@contextmanager
def _open_tar(archive: Path, max_bytes: int) -> Iterator[Iterator[_Member]]:
    unzip = gzip.open if _starts_with(archive, b"\x1f\x8b") else open
    with (
        unzip(archive, "rb") as unzipped,
        # "r|" never seeks, so that every byte of a gzip bomb passes by the counter, those of ignored members too
        tarfile.open(fileobj=io.BufferedReader(_CountedReader(unzipped, max_bytes)), mode="r|") as tar,
    ):
        yield (_tar_member(tar, info) for info in tar)


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    return _Member(info.name, info.isreg(), info.isdir(), lambda: tar.extractfile(info))


class _CountedReader(io.RawIOBase):
    """Passes a stream on, but not more than a number of bytes of it."""

    def __init__(self, source: IO[bytes] | gzip.GzipFile, max_bytes: int) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._room = max_bytes + MAX_FILES * tarfile.RECORDSIZE  # headers and padding are not the adapter's bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        data = self._source.read(len(view))
        self._room -= len(data)
        if self._room < 0:
            raise _too_large(self._max_bytes)
        view[: len(data)] = data
        return len(data)


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
