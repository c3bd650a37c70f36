"""Which server to load, as the command line says it: one that runs somewhere, or our own, started for the occasion."""

import os
import shlex
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from onebase_server.bench.dialects import DialectName
from onebase_server.bench.load import Integers


class ServerChoice(BaseModel):
    """Exactly one of `url`, `demo` and `base` says which server; the rest is for one or the other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # a server that runs already
    url: str | None = Field(None, description="Address of a running server, such as http://127.0.0.1:8000.")
    dialect: DialectName = Field("openai", description="How it is told which adapter: openai is also vLLM and Onebase.")
    model: str | None = Field(None, description="Its base's name; by default what it lists.")
    api_key: SecretStr | None = Field(
        default_factory=lambda: _key_from_environment(), exclude=True
    )  # no flag: see with_flags
    server_pid: int | None = Field(None, ge=1, description="Its process here, to measure the memory of all below it.")
    vocab_size: int = Field(32000, ge=2, description="Prompts at --url are random ids below this.")
    tokenizer: Path | None = Field(None, description="Directory of its tokenizer, for --prompt-form text.")

    # one that is started here
    demo: bool = Field(False, description="Start a server of the demo base.")
    base: Path | None = Field(None, description="Start a server of this base: a directory.")
    ranks: Integers = Field((8, 16, 32, 64), description="Ranks of its random adapters, in turn.")
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


def _key_from_environment() -> SecretStr | None:
    key = os.environ.get("ONEBASE_API_KEY")
    return SecretStr(key) if key else None
