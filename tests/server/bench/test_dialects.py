from collections.abc import Callable
from typing import Any

import httpx
import pytest

from onebase_server.bench.dialects import DIALECTS, DialectName, completion_body, discover
from onebase_server.errors import ConfigurationError

SHARED: dict[str, Any] = {
    "prompt": [5, 6],
    "max_tokens": 7,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.mark.parametrize(
    ("dialect", "adapter", "selection"),
    [
        ("openai", None, {"model": "base"}),
        ("openai", "pirate", {"model": "pirate"}),
        ("llama.cpp", None, {"model": "base", "lora": [{"id": 0, "scale": 0.0}], "cache_prompt": False}),
        ("llama.cpp", "3", {"model": "base", "lora": [{"id": 3, "scale": 1.0}], "cache_prompt": False}),
    ],
)
def test_a_request_names_its_adapter_as_the_server_understands_it(
    dialect: DialectName, adapter: str | None, selection: dict[str, Any]
) -> None:
    body = completion_body(
        DIALECTS[dialect], "base", adapter, [5, 6], output_tokens=7, ignore_eos=False, is_prefix_shared=False
    )
    assert body == SHARED | selection


def test_ignore_eos_is_sent_only_if_wanted() -> None:
    arguments: dict[str, Any] = {"output_tokens": 7, "is_prefix_shared": True}
    body = completion_body(DIALECTS["llama.cpp"], "base", None, "a text", ignore_eos=True, **arguments)
    assert (body["ignore_eos"], body["cache_prompt"], body["prompt"]) == (True, True, "a text")


@pytest.fixture
def client_of() -> Callable[..., httpx.Client]:
    """A client of a server that answers these paths with this JSON: llama.cpp's and vLLM's do not run here."""

    def make(answers: dict[str, Any]) -> httpx.Client:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answers[request.url.path]))
        return httpx.Client(transport=transport, base_url="http://server")

    return make


def test_openai_style_servers_tell_adapters_by_their_parent(client_of: Callable[..., httpx.Client]) -> None:
    cards = [{"id": "base", "parent": None}, {"id": "sql", "parent": "base"}, {"id": "chat", "parent": "base"}]
    served = DIALECTS["openai"].discover(client_of({"/v1/models": {"data": cards}}))
    assert (served.model, served.adapters) == ("base", ("sql", "chat"))


def test_llama_cpp_numbers_its_adapters(client_of: Callable[..., httpx.Client]) -> None:
    adapters = [{"id": 0, "path": "a.gguf", "scale": 0.0}, {"id": 1, "path": "b.gguf", "scale": 0.0}]
    answers = {"/v1/models": {"data": [{"id": "model.gguf"}]}, "/lora-adapters": adapters}
    served = DIALECTS["llama.cpp"].discover(client_of(answers))
    assert (served.model, served.adapters) == ("model.gguf", ("0", "1"))


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"http://127\.0\.0\.1:9 does not say what it serves"):
        discover(DIALECTS["openai"], "http://127.0.0.1:9", None)
