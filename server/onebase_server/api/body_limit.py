"""A bound on JSON bodies, which are held in memory to be parsed; uploads are streamed and bounded on their own."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onebase_server.api.errors import error_response

MAX_JSON_BYTES = 32 << 20


class BodyLimit:
    """Middleware that answers 413 to larger bodies: at once if `Content-Length` says so, else while they arrive."""

    def __init__(self, app: ASGIApp, *, max_bytes: int = MAX_JSON_BYTES, streamed_paths: frozenset[str]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._streamed_paths = streamed_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its body."""
        if scope["type"] != "http" or scope["path"] in self._streamed_paths:
            await self._app(scope, receive, send)
            return
        too_large = HTTPException(413, f"The body has more than {self._max_bytes} bytes, the most that is taken here.")
        if int(Headers(scope=scope).get("content-length", 0)) > self._max_bytes:
            await error_response(too_large)(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise too_large
            return message

        await self._app(scope, receive_counted, send)
