"""What differs between servers: how a request names its adapter, and where a server lists what it has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpx

from onebase_server.errors import ConfigurationError

DialectName = Literal["openai", "llama.cpp"]
DISCOVERY_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Served:
    """What a server says it has."""

    model: str
    adapters: tuple[str, ...]


class Dialect(Protocol):
    """One server's way to say it."""

    def select(self, model: str, adapter: str | None, *, is_prefix_shared: bool) -> dict[str, Any]:
        """The fields of a completion request that choose a model, or an adapter of it."""

    def discover(self, client: httpx.Client) -> Served:
        """The base and the adapters that are there."""


class OpenAiDialect:
    """`model` names the base or the adapter, as with Onebase and vLLM."""

    def select(self, model: str, adapter: str | None, *, is_prefix_shared: bool) -> dict[str, Any]:
        """`{"model": …}`."""
        return {"model": adapter or model}

    def discover(self, client: httpx.Client) -> Served:
        """The first model without a parent, and the models with one."""
        cards = _get(client, "/v1/models")["data"]
        bases = [card["id"] for card in cards if not card.get("parent")]
        if not bases:
            raise ConfigurationError(f"{client.base_url} lists no model; name one with --model.")
        return Served(bases[0], tuple(card["id"] for card in cards if card.get("parent")))


class LlamaCppDialect:
    """llama.cpp's server: adapters have numbers, and a request lists those it wants.

    An empty list means all that the server was started with; beside one that is listed, all others are off. So the base
    is asked for by listing an adapter with scale 0.
    """

    def select(self, model: str, adapter: str | None, *, is_prefix_shared: bool) -> dict[str, Any]:
        """`{"lora": [{"id": …, "scale": 1}], …}`; a slot's old prompt is reused only where prompts share a prefix."""
        lora = {"id": 0, "scale": 0.0} if adapter is None else {"id": int(adapter), "scale": 1.0}
        return {"model": model, "lora": [lora], "cache_prompt": is_prefix_shared}

    def discover(self, client: httpx.Client) -> Served:
        """The one model, and the numbers of the adapters it was started with."""
        model = _get(client, "/v1/models")["data"][0]["id"]
        return Served(model, tuple(str(adapter["id"]) for adapter in _get(client, "/lora-adapters")))


DIALECTS: dict[DialectName, Dialect] = {"openai": OpenAiDialect(), "llama.cpp": LlamaCppDialect()}


def discover(dialect: Dialect, url: str, api_key: str | None) -> Served:
    """Ask a server what it has.

    Raises:
        ConfigurationError: it cannot be reached, or answers with something else.
    """
    try:
        with httpx.Client(base_url=url, headers=authorization(api_key), timeout=DISCOVERY_TIMEOUT_SECONDS) as client:
            return dialect.discover(client)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigurationError(f"{url} does not say what it serves: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{url} lists its models in a form that is not known ({error!r}).") from error


def completion_body(
    dialect: Dialect,
    model: str,
    adapter: str | None,
    prompt: Sequence[int] | str,
    *,
    output_tokens: int,
    ignore_eos: bool,
    is_prefix_shared: bool,
) -> dict[str, Any]:
    """The JSON of a streamed, greedy `POST /v1/completions`."""
    body = {
        **dialect.select(model, adapter, is_prefix_shared=is_prefix_shared),
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return {**body, "ignore_eos": True} if ignore_eos else body  # OpenAI's own server refuses fields it does not know


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _get(client: httpx.Client, path: str) -> Any:
    return client.get(path).raise_for_status().json()
