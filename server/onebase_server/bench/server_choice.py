"""Which server to load, as the command line says it: one that runs somewhere, or our own, started for the occasion."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from onebase_server.bench.dialects import DialectName
from onebase_server.bench.load import Integers, Words
from onebase_server.errors import ConfigurationError


class Vocabulary(BaseModel):
    """What prompts for a running server are made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(32000, ge=2, description="Prompts for a running server are random ids below this.")
    tokenizer: Path | None = Field(None, description="Directory of its tokenizer, for --prompt-form text.")


class ServerChoice(Vocabulary):
    """Exactly one of `url`, `demo` and `base` says which server; the rest is for one or the other."""

    # a server that runs already
    url: str | None = Field(None, description="Address of a running server, such as http://127.0.0.1:8000.")
    dialect: DialectName = Field("openai", description="How it is told which adapter: openai is also vLLM and Onebase.")
    model: str | None = Field(None, description="Its base's name; by default what it lists.")
    api_key: SecretStr | None = Field(
        default_factory=lambda: _key_from_environment(), exclude=True
    )  # no flag: see with_flags
    server_pid: int | None = Field(None, ge=1, description="Its process here, to measure the memory of all below it.")

    # one that is started here
    demo: bool = Field(False, description="Start a server of the demo base.")
    base: Path | None = Field(None, description="Start a server of this base: a directory.")
    ranks: Integers = Field((8, 16, 32, 64), description="Ranks of its random adapters, in turn.")
    targets: Words = Field((), description="Linears that they adapt, such as q_proj,v_proj; by default all.")
    serve_flags: str = Field("", description='More flags for `onebase serve`, such as "--threads 2".')

    @property
    def key(self) -> str | None:
        """The key in the clear."""
        return self.api_key.get_secret_value() if self.api_key else None

    @property
    def serve_arguments(self) -> list[str]:
        """`serve_flags`, split as a shell does."""
        return shlex.split(self.serve_flags)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("it has to begin with http:// or https://")
        return url.rstrip("/").removesuffix("/v1") if url else url

    @field_validator("serve_flags")
    @classmethod
    def _check_serve_flags(cls, serve_flags: str) -> str:
        shlex.split(serve_flags)  # raises ValueError where a quote is not closed
        return serve_flags

    @model_validator(mode="after")
    def _check_one_is_chosen(self) -> Self:
        if [self.url is not None, self.demo, self.base is not None].count(True) != 1:
            raise ValueError("Say which server: --url of a running one, or --demo or --base to start one.")
        return self


_COMPARED_SERVER_KEYS = {"dialect": "dialect", "model": "model", "pid": "server_pid"}


def read_compared_servers(texts: Sequence[str], vocabulary: Vocabulary) -> dict[str, ServerChoice]:
    """Servers by name, each out of `NAME=URL` and perhaps `,dialect=…,model=…,pid=…` behind it.

    Raises:
        ConfigurationError: one is not of this form, or two have the same name.
    """
    servers: dict[str, ServerChoice] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        if name in servers:
            raise ConfigurationError(f"--server {text}: there is another server named {name}.")
        servers[name] = _compared_server(text, rest, vocabulary)
    return servers


def _compared_server(text: str, rest: str, vocabulary: Vocabulary) -> ServerChoice:
    url, *options = rest.split(",")
    fields: dict[str, object] = {"url": url, **vocabulary.model_dump()}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _COMPARED_SERVER_KEYS:
            keys = ", ".join(_COMPARED_SERVER_KEYS)
            raise ConfigurationError(f"--server {text}: {key} is not known; behind the address may stand {keys}.")
        fields[_COMPARED_SERVER_KEYS[key]] = value
    try:
        return ServerChoice.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise ConfigurationError(
            f"--server {text} is not NAME=URL[,dialect=…][,model=…][,pid=…]: {problems}."
        ) from error


def _key_from_environment() -> SecretStr | None:
    key = os.environ.get("ONEBASE_API_KEY")
    return SecretStr(key) if key else None
