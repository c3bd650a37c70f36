"""One streamed completion over HTTP, with the time of each chunk.

The generator may share the machine with the server, so it must cost little: asyncio's transports, httptools' parser in
C and msgspec, where a general HTTP client works in Python on every chunk.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from onebase_server.bench.dialects import authorization

REQUEST_TIMEOUT_SECONDS = 900.0
MAX_ERROR_LENGTH = 300


@dataclass(slots=True)
class Answer:
    """What came back. Times are `time.perf_counter()` seconds."""

    sent_at: float
    ended_at: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    """When each chunk with text came."""
    prompt_tokens: int | None = None
    """As the server's usage says; None if it reports none."""
    output_tokens: int | None = None
    error: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class CompletionClient:
    """Posts completions to one server, each on a connection of its own."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        headers = {"Host": parts.netloc, "Content-Type": "application/json", "Connection": "close"}
        lines = [f"{name}: {value}\r\n" for name, value in (headers | authorization(api_key)).items()]
        self._head = f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\n{''.join(lines)}"

    def encode(self, body: dict[str, object]) -> bytes:
        """A request as it goes over the wire; made before the clock runs."""
        content = msgspec.json.encode(body)
        return f"{self._head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    async def post(self, request: bytes) -> Answer:
        """Send a request and follow its stream to the end; whatever fails is the answer's `error`."""
        answer = Answer(sent_at=time.perf_counter())
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                transport, stream = await asyncio.get_running_loop().create_connection(
                    lambda: _Stream(answer), self._host, self._port, ssl=self._ssl
                )
                transport.write(request)
                await stream.ended
        except TimeoutError:
            answer.error = f"no end after {REQUEST_TIMEOUT_SECONDS:.0f} s"
        except OSError as error:
            answer.error = str(error)
        finally:
            if transport is not None:
                transport.close()
        answer.ended_at = time.perf_counter()
        return answer


class _Stream(asyncio.Protocol):
    """Server-sent events of one response, noted in an `Answer` as they come."""

    def __init__(self, answer: Answer) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._answer = answer
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._rest = b""
        """The last line, while it is not complete; of an error response, the whole body."""

    def data_received(self, data: bytes) -> None:
        """Bytes from the server."""
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:  # its own, or around what a callback raised
            self._end(f"not a stream of completions: {error.__context__ or error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, which is too early unless the response has ended."""
        self._end(f"connection lost before the end: {exc}" if exc else "connection closed before the end")

    def on_body(self, body: bytes) -> None:
        """A piece of the response's body."""
        if self._parser.get_status_code() != 200:
            self._rest += body
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._note(_decode_chunk(line[6:]))

    def on_message_complete(self) -> None:
        """The response has ended."""
        status = self._parser.get_status_code()
        if status != 200:
            self._end(f"HTTP {status}: {self._rest[:MAX_ERROR_LENGTH].decode(errors='replace')}")
        elif not self._answer.chunk_times and self._answer.output_tokens is None:
            self._end("an empty answer")
        else:
            self._end(None)

    def _note(self, chunk: _Chunk) -> None:
        if chunk.error is not None:
            self._end(msgspec.json.encode(chunk.error).decode()[:MAX_ERROR_LENGTH])
        if chunk.usage is not None:
            self._answer.prompt_tokens = chunk.usage.prompt_tokens
            self._answer.output_tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].text:
            self._answer.chunk_times.append(self._now)

    def _end(self, error: str | None) -> None:
        """The first end counts: closing the connection afterwards is no error."""
        if not self.ended.done():
            self._answer.error = error
            self.ended.set_result(None)
