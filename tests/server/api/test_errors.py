import json

import pytest

from onebase_adapters.store import AdapterStore
from onebase_server.api.body_limit import MAX_JSON_BYTES

CHAT = "/v1/chat/completions"


def error_of(response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("method", "path", "arguments", "status", "code", "message"),
    [
        ("GET", "/v1/nowhere", {}, 404, "not_found", "no GET /v1/nowhere"),
        ("PUT", CHAT, {}, 405, "method_not_allowed", "does not take PUT"),
        ("POST", CHAT, {"content": "{"}, 400, "invalid_request", "not valid JSON"),
        ("POST", CHAT, {"content": "[]"}, 400, "invalid_request", "must be a JSON object"),
        ("POST", CHAT, {"data": {"a": "b"}}, 400, "invalid_request", "application/x-www-form-urlencoded"),
        ("POST", CHAT, {"content": "[" * 100_000}, 400, "invalid_request", "parsing the body"),
        ("POST", CHAT, {"json": {}}, 400, "invalid_request", "model is missing"),
        ("GET", "/v1/adapters/nobody", {}, 404, "adapter_not_found", "nobody"),
        ("DELETE", "/v1/adapters/nobody", {}, 404, "adapter_not_found", "nobody"),
        ("POST", "/v1/adapters/nobody/rollback", {"json": {"version": 10**30}}, 404, "adapter_not_found", "nobody"),
        ("GET", f"/v1/models/nobody@{10**30}", {}, 404, "model_not_found", "a version is a number"),
        ("GET", f"/v1/models/nobody@{'9' * 5000}", {}, 404, "model_not_found", "a version is a number"),
        ("GET", "/ready", {}, 503, "engine_unavailable", "starting"),
        ("POST", "/v1/completions", {"json": {"model": "tiny", "prompt": "x"}}, 503, "engine_unavailable", "starting"),
    ],
)
async def test_every_failure_is_an_envelope_that_says_what_is_wrong(
    make_client, method, path, arguments, status, code, message
):
    async with make_client() as client:
        response = await client.request(method, path, **arguments)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "\ud800"}),
        ("/v1/completions", {"model": "tiny", "prompt": ["fine", "\ud800"]}),
        ("/v1/completions", {"model": "\ud800", "prompt": "fine"}),
        ("/v1/completions", {"model": "tiny", "prompt": "fine", "stop": "\ud800"}),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}),
        ("/v1/unload_lora_adapter", {"lora_name": "\ud800"}),
    ],
)
async def test_half_of_a_surrogate_pair_is_refused_as_no_text(make_client, path, body):
    async with make_client() as client:
        response = await client.post(path, content=json.dumps(body))  # httpx itself would refuse to send it unescaped
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_request")
    assert "surrogate pair" in error_of(response)["message"]


async def test_a_bug_is_not_told_to_the_client(make_client, monkeypatch):
    monkeypatch.setattr(AdapterStore, "list_adapters", lambda self: 1 / 0)
    async with make_client() as client:
        response = await client.get("/v1/models")
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
    assert "division" not in response.text


@pytest.mark.parametrize("announced", [True, False])
async def test_a_json_body_over_the_limit_is_refused(make_client, announced):
    async def chunks():
        for _ in range(MAX_JSON_BYTES // (1 << 20) + 1):
            yield b" " * (1 << 20)

    body = b" " * (MAX_JSON_BYTES + 1) if announced else chunks()
    async with make_client() as client:
        response = await client.post(CHAT, content=body)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
