"""A running generation as an HTTP response: a stream of server-sent events, or one JSON object.

Both end the generation when the client goes away. What the events hold is the endpoints' business.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from onebase_server.api.auth import check_api_key
from onebase_server.api.context import context_of
from onebase_server.api.errors import envelope_of, error_response, outcome_of, status_of
from onebase_server.api.generation import Generation, Piece

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that did not wait; nobody but the access log sees it."""

_encoder = msgspec.json.Encoder()


class GenerationRoute(APIRoute):
    """A generation route: its key is checked before its body is parsed, and whoever is refused is counted.

    FastAPI parses the body before it asks the dependencies, and a `Generation` counts itself, if one gets that far.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, with exceptions counted on their way to the error handlers."""
        handle = super().get_route_handler()

        async def handle_and_count(request: Request) -> Response:
            try:
                await check_api_key(request)
                return await handle(request)
            except Exception as error:  # counted, whatever it is, and passed on
                context_of(request).metrics.requests.labels(outcome_of(error)).inc()
                raise

        return handle_and_count


class EventStream(StreamingResponse):
    """Server-sent events, `data: {…}`, ending with `data: [DONE]`, or with an error event and nothing more."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, chunks: AsyncGenerator[object, None]) -> None:
        self._generation = generation
        self._events = _encode_events(chunks)
        super().__init__(self._events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the chunks end or the client goes away; then the generation is over in any case."""
        with self._generation:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)


async def _encode_events(chunks: AsyncGenerator[object, None]) -> AsyncGenerator[bytes, None]:
    """The chunks as events, each once all streams have made theirs of the same step.

    So they are sent one right after another: a client on these cores then wakes up for a step, not for a token.
    """
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                event = b"data: " + _encoder.encode(chunk) + b"\n\n"
                await asyncio.sleep(0)
                yield event
    except Exception as error:  # the status is sent already, so that whatever went wrong has to be an event
        _log_unexpected(error)
        yield b"data: " + _encoder.encode(envelope_of(error)) + b"\n\n"
    else:
        yield b"data: [DONE]\n\n"


async def respond_whole(request: Request, generation: Generation, build: Callable[[list[Piece]], object]) -> Response:
    """Run a generation to its end and answer with what `build` makes of its pieces, or with the error it met."""
    with generation:
        try:
            pieces = await _collect(request, generation)
            if pieces is None:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return Response(_encoder.encode(build(pieces)), media_type="application/json")
        except Exception as error:  # answered here, so that the generation is left as one that failed, not as aborted
            _log_unexpected(error)
            return error_response(error)


async def _collect(request: Request, generation: Generation) -> list[Piece] | None:
    """All pieces; None if the client went away, which aborts what still runs."""

    async def gather() -> list[Piece]:
        async with aclosing(generation.pieces()) as pieces:
            return [piece async for piece in pieces]

    work = asyncio.create_task(gather())
    leaving = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        leaving.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _log_unexpected(error: Exception) -> None:
    if status_of(error) == 500:
        logger.error("a generation failed", exc_info=error)
