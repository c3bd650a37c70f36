"""A multipart upload straight to files: bounded while it is read, never in memory, hashed on the way.

It knows forms and bytes, not adapters. Starlette's own form parser spools whole uploads to the system's temporary
directory before anyone can object, so the streaming parser beneath it is used directly.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from onebase_adapters.errors import UploadTooLarge
from onebase_server.errors import BadRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

WRITE_BYTES = 1 << 20
"""How much is gathered before a worker thread parses, hashes and writes it."""
MAX_FIELD_BYTES = 4096
FRAMING_BYTES = 64 << 10
"""What a form may need beyond its files: boundaries, headers and fields."""


@dataclass(frozen=True)
class UploadedFile:
    """A file part, written in full."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Form:
    """A whole form: its text fields, and where its files were written."""

    fields: dict[str, str]
    files: dict[str, UploadedFile]


async def receive_form(
    request: Request, directory: Path, *, max_bytes: int, fields: Collection[str], files: Collection[str]
) -> Form:
    """Read a `multipart/form-data` body, writing each file part to `directory` under its part's name.

    `fields` and `files` are the names that the form may have; a file part is known by its name or its file name.

    Raises:
        UploadTooLarge: more than `max_bytes`; at once if `Content-Length` says so.
        BadRequest: not a form, not in one piece, or with a part that is not expected.
    """
    content_type, options = parse_options_header(request.headers.get("content-type"))
    if content_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise BadRequest("The body must be multipart/form-data.")
    limit = max_bytes + FRAMING_BYTES
    if int(request.headers.get("content-length", 0)) > limit:
        raise _too_large(max_bytes)
    writer = _FormWriter(directory, frozenset(fields), frozenset(files))
    try:
        parser = MultipartParser(options[b"boundary"], writer.callbacks)
        await _feed(parser, request, limit, max_bytes)
    except FormParserError as error:
        raise BadRequest(f"The form is malformed: {error}") from error
    except ClientDisconnect as error:
        raise BadRequest("The upload is cut off: the client closed the connection.") from error
    finally:
        writer.close()
    return writer.finish()


async def _feed(parser: MultipartParser, request: Request, limit: int, max_bytes: int) -> None:
    pending = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise _too_large(max_bytes)
        pending += chunk
        if len(pending) >= WRITE_BYTES:
            await anyio.to_thread.run_sync(parser.write, bytes(pending))
            pending.clear()
    await anyio.to_thread.run_sync(parser.write, bytes(pending))


def _too_large(max_bytes: int) -> UploadTooLarge:
    return UploadTooLarge(f"The upload has more than {max_bytes} bytes, the most that this server takes.")


@dataclass
class _Part:
    """The part being read."""

    disposition: bytes = b""
    name: str = ""
    value: bytearray = field(default_factory=bytearray)
    path: Path | None = None
    sink: BinaryIO | None = None
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


class _FormWriter:
    """The parser's callbacks: text fields are gathered, file parts written and hashed."""

    def __init__(self, directory: Path, fields: frozenset[str], files: frozenset[str]) -> None:
        self._directory = directory
        self._allowed_fields = fields
        self._allowed_files = files
        self._fields: dict[str, str] = {}
        self._files: dict[str, UploadedFile] = {}
        self._part = _Part()
        self._header_name = b""
        self._header_value = b""
        self._is_complete = False

    @property
    def callbacks(self) -> "MultipartCallbacks":
        """What the parser calls; data comes as (buffer, start, end)."""
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open_part,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._complete,
        }

    def finish(self) -> Form:
        """The form; raises BadRequest if the body ended before it did."""
        if not self._is_complete:
            raise BadRequest("The upload is cut off: the form's closing boundary is missing.")
        return Form(self._fields, self._files)

    def close(self) -> None:
        """Close the file of a part that was cut off."""
        if self._part.sink:
            self._part.sink.close()

    def _begin_part(self) -> None:
        self._part = _Part()

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._part.disposition = self._header_value
        self._header_name = self._header_value = b""

    def _open_part(self) -> None:
        _, options = parse_options_header(self._part.disposition)
        name, filename = (options.get(key, b"").decode("utf-8", "replace") for key in (b"name", b"filename"))
        if name not in self._allowed_fields | self._allowed_files and filename in self._allowed_files:
            name = filename
        if name in self._fields or name in self._files:
            raise BadRequest(f"The form has {name} twice.", param=name)
        if name in self._allowed_files:
            self._part.path = self._directory / name
            self._part.sink = self._part.path.open("wb")
        elif name not in self._allowed_fields:
            known = ", ".join(sorted(self._allowed_fields | self._allowed_files))
            raise BadRequest(f"The form field {name!r} is not supported; these are: {known}.", param=name)
        self._part.name = name

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        part, view = self._part, memoryview(data)[start:end]
        if part.sink:
            part.sink.write(view)
            part.digest.update(view)
            return
        part.value += view
        if len(part.value) > MAX_FIELD_BYTES:
            raise BadRequest(f"The form field {part.name} is longer than {MAX_FIELD_BYTES} bytes.", param=part.name)

    def _end_part(self) -> None:
        part = self._part
        if part.path and part.sink:
            part.sink.close()
            self._files[part.name] = UploadedFile(part.path, part.digest.hexdigest())
        else:
            self._fields[part.name] = part.value.decode("utf-8", "replace")

    def _complete(self) -> None:
        self._is_complete = True
