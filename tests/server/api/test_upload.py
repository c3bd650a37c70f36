import hashlib
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from onebase_adapters.errors import UploadTooLarge
from onebase_server.api.upload import FRAMING_BYTES, Form, receive_form
from onebase_server.errors import BadRequest

MAX_BYTES = 1 << 20


def multipart(*parts: tuple[str, str | None, bytes]) -> httpx.Request:
    """A form as httpx sends it; each part is (name, file name, content)."""
    return httpx.Request("POST", "http://test", files=[(name, (filename, body)) for name, filename, body in parts])


async def receive(
    directory: Path, request: httpx.Request, *, chunk: int = 1000, body: bytes | None = None, length: int | None = None
) -> Form:
    """Give a request's body to `receive_form` in pieces of `chunk` bytes."""
    body = request.read() if body is None else body
    headers = {"content-type": request.headers["content-type"]}
    if length is not None:
        headers["content-length"] = str(length)
    pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)] or [b""]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False
    stream = iter(messages)

    async def receive_message() -> dict:
        return next(stream)

    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": raw_headers}
    return await receive_form(
        Request(scope, receive_message), directory, max_bytes=MAX_BYTES, fields={"name"}, files={"archive", "a.bin"}
    )


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
async def test_fields_are_read_and_files_written_and_hashed_however_the_body_arrives(tmp_path, chunk):
    content = bytes(range(256)) * 20 + b"\r\n--not a boundary"
    form = await receive(tmp_path, multipart(("name", None, b"pirate"), ("archive", "x.zip", content)), chunk=chunk)
    assert form.fields == {"name": "pirate"}
    assert form.files["archive"].path == tmp_path / "archive"
    assert form.files["archive"].path.read_bytes() == content
    assert form.files["archive"].sha256 == hashlib.sha256(content).hexdigest()


async def test_a_file_is_known_by_its_file_name_too(tmp_path):
    form = await receive(tmp_path, multipart(("files", "a.bin", b"content")))
    assert form.files["a.bin"].path.read_bytes() == b"content"


async def test_content_length_over_the_limit_is_refused_before_a_byte_is_read(tmp_path):
    with pytest.raises(UploadTooLarge):
        await receive(tmp_path, multipart(("archive", "x", b"")), length=MAX_BYTES + FRAMING_BYTES + 1)
    assert list(tmp_path.iterdir()) == []


async def test_more_bytes_than_allowed_are_refused_while_they_arrive(tmp_path):
    request = multipart(("archive", "x", bytes(MAX_BYTES + FRAMING_BYTES)))
    with pytest.raises(UploadTooLarge):
        await receive(tmp_path, request, chunk=1 << 16)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (multipart(("surprise", None, b"x")), "'surprise' is not supported"),
        (multipart(("../archive", "../../x", b"x")), "is not supported"),
        (multipart(("name", None, b"x"), ("name", None, b"y")), "name twice"),
        (multipart(("name", None, bytes(5000))), "longer than"),
        (httpx.Request("POST", "http://test", json={}), "must be multipart/form-data"),
    ],
)
async def test_a_form_that_is_not_expected_is_refused_by_name(tmp_path, request_, message):
    with pytest.raises(BadRequest, match=message):
        await receive(tmp_path, request_)


async def test_a_form_that_ends_early_is_refused(tmp_path):
    request = multipart(("archive", "x", b"some content"))
    with pytest.raises(BadRequest, match="cut off"):
        await receive(tmp_path, request, body=request.read()[:-6])


async def test_a_body_that_is_no_form_is_refused(tmp_path):
    request = multipart(("archive", "x", b"some content"))
    with pytest.raises(BadRequest, match="malformed"):
        await receive(tmp_path, request, body=b"not a form at all")
