"""The client against sockets that send what they are told, in the pieces they are told."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from onebase_server.bench.driver import TimedRequest, drive
from onebase_server.bench.stream_client import Answer, CompletionClient

EVENTS = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
DONE = "data: [DONE]\n\n"

Serve = Callable[..., AbstractAsyncContextManager[CompletionClient]]


def event(text: str) -> str:
    return f'data: {{"choices": [{{"text": "{text}"}}], "usage": null}}\n\n'


def chunked(*bodies: str) -> list[str]:
    return [f"{len(body.encode()):x}\r\n{body}\r\n" for body in bodies] + ["0\r\n\r\n"]


@pytest.fixture
def serve() -> Serve:
    @asynccontextmanager
    async def start(*pieces: str, pause: float = 0.0) -> AsyncIterator[CompletionClient]:
        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece.encode())
                await writer.drain()
                await asyncio.sleep(pause)
            writer.close()

        server = await asyncio.start_server(respond, "127.0.0.1", 0)
        async with server:
            yield CompletionClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None)

    return start


async def post(client: CompletionClient) -> Answer:
    return await client.post(client.encode({"prompt": [1]}))


async def test_chunks_with_text_are_timed_and_usage_is_read(serve: Serve) -> None:
    pieces = chunked(event("a"), event("b"), event(""), USAGE + DONE)
    async with serve(EVENTS, *pieces, pause=0.05) as client:
        answer = await post(client)
    assert answer.error is None
    assert (answer.prompt_tokens, answer.output_tokens, len(answer.chunk_times)) == (3, 4, 2)
    first, second = answer.chunk_times
    assert answer.sent_at < first < second < answer.ended_at
    assert second - first > 0.04


async def test_events_may_be_cut_anywhere(serve: Serve) -> None:
    stream = event("a") + event("data: {b") + USAGE + DONE
    async with serve(EVENTS, *chunked(*stream)) as client:  # a chunk for each character
        answer = await post(client)
    assert (answer.error, answer.output_tokens, len(answer.chunk_times)) == (None, 4, 2)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        (["HTTP/1.1 503 Busy\r\nContent-Length: 8\r\n\r\n", "too busy"], "HTTP 503: too busy"),
        ([EVENTS, *chunked(event("a"), 'data: {"error": {"message": "died"}}\n\n')], '{"message":"died"}'),
        ([EVENTS, *chunked(event("a"))[:-1]], "connection closed before the end"),
        ([EVENTS, *chunked(DONE)], "an empty answer"),
        (["SSH-2.0-OpenSSH\r\n"], "not a stream of completions"),
        ([EVENTS, *chunked('data: {"choices": 1}\n\n')], "not a stream of completions"),
    ],
)
async def test_whatever_fails_is_told(serve: Serve, pieces: list[str], error: str) -> None:
    async with serve(*pieces) as client:
        answer = await post(client)
    assert answer.error is not None
    assert error in answer.error


async def test_a_closed_port_is_an_error_of_the_answer() -> None:
    answer = await post(CompletionClient("http://127.0.0.1:9", None))
    assert "9" in (answer.error or "")


async def test_a_closed_loop_has_so_many_in_flight(serve: Serve) -> None:
    async with serve(EVENTS, *chunked(event("a"), USAGE), pause=0.05) as client:
        record = await drive(client, [TimedRequest(0, client.encode({}))] * 4, concurrency=2)
    spans = sorted((answer.sent_at, answer.ended_at) for answer in record.answers)
    assert spans[1][0] < spans[0][1]
    assert spans[2][0] >= min(end for _, end in spans[:2])


async def test_by_rate_requests_are_sent_at_their_times_whether_answered_or_not(serve: Serve) -> None:
    async with serve(EVENTS, *chunked(event("a"), USAGE), pause=0.3) as client:
        requests = [TimedRequest(at, client.encode({})) for at in (0.0, 0.05, 0.1)]
        record = await drive(client, requests, concurrency=None)
    sent = sorted(answer.sent_at for answer in record.answers)
    assert sent[1] - sent[0] > 0.03
    assert sent[2] - sent[1] > 0.03
    assert sent[2] < min(answer.ended_at for answer in record.answers)
