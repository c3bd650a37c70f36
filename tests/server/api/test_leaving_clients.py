"""What happens to a request whose client, or whose engine, goes away."""

import contextlib
import os
import signal
import threading

import httpx
import pytest
from openai import APIError, InternalServerError

LONG = {"model": "tiny", "prompt": "Long", "max_tokens": 2000, "ignore_eos": True}


async def read_and_leave(url: str, fields: dict) -> None:
    """Send a long request and close the connection: after the first event of a stream, else after a while."""
    timeout = httpx.Timeout(10, read=0.3)
    async with (
        httpx.AsyncClient(timeout=timeout) as client,
        client.stream("POST", f"{url}/v1/completions", json=LONG | fields) as response,
    ):
        await anext(response.aiter_lines())


@pytest.mark.parametrize("fields", [{"stream": True}, {}, {"n": 3}, {"stream": True, "n": 3}])
async def test_a_request_is_aborted_when_its_client_goes_away(server, fields):
    aborted = server.metric("onebase_requests_total", outcome="aborted")
    with contextlib.suppress(httpx.ReadTimeout):
        await read_and_leave(server.url, fields)
    server.wait_until(lambda: server.context.admission.in_flight == 0, seconds=2)
    assert server.metric("onebase_requests_total", outcome="aborted") == aborted + 1
    server.wait_until(lambda: 'vllm:num_requests_running{model_name="tiny"} 0.0' in server.get("/metrics").text, 3)


def kill_engine(server) -> None:
    os.kill(server.context.engine.pid, signal.SIGKILL)


async def test_when_the_engine_dies_a_stream_ends_with_an_error_event_and_service_resumes(server, openai):
    restarts = server.metric("onebase_engine_restarts_total")
    stream = await openai.completions.create(
        model="tiny", prompt="x", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(stream)
    kill_engine(server)
    with pytest.raises(APIError) as caught:
        [chunk async for chunk in stream]
    assert caught.value.code == "engine_unavailable"
    server.wait_ready()
    assert server.metric("onebase_engine_restarts_total") == restarts + 1
    assert (await openai.completions.create(model="tiny", prompt="x", max_tokens=2)).choices


async def test_when_the_engine_dies_a_whole_answer_becomes_503(server, openai):
    threading.Timer(0.3, kill_engine, [server]).start()
    with pytest.raises(InternalServerError) as caught:
        await openai.completions.create(
            model="tiny", prompt="x", max_tokens=2000, extra_body={"ignore_eos": True}, timeout=30
        )
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
    assert caught.value.response.headers["retry-after"] == "1"
    ready = server.get("/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "engine_unavailable")
    assert server.get("/health").status_code == 200
    server.wait_ready()
