"""What a load is sent to: a server's address, its adapters, and prompts that suit its vocabulary."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from onebase_server.bench.dialects import DIALECTS, Dialect, Served, discover
from onebase_server.bench.load import Load, LoadTraits
from onebase_server.bench.own_server import kv_cache_bytes, start_server
from onebase_server.bench.prompts import Prompts, TextPrompts, TokenIdPrompts
from onebase_server.bench.server_choice import ServerChoice
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.progress import OnProgress, ignore_progress
from onebase_server.settings import EngineSettings

_DEFAULT_KV_CACHE_MEMORY: int = EngineSettings.model_fields["kv_cache_memory"].default


class AdapterSource(Protocol):
    """Where a load's adapters come from."""

    def require(self, count: int, ranks: Sequence[int]) -> None:
        """Raises ConfigurationError if there cannot be so many."""

    def names(self, count: int, ranks: Sequence[int], on_progress: OnProgress = ...) -> list[str]:
        """`count` adapters to ask for, of `ranks` in turn where that can be chosen; raises as `require` does."""


@dataclass(frozen=True)
class ServedAdapters:
    """Those that a running server has; their ranks are what they are."""

    served: Served

    def require(self, count: int, ranks: Sequence[int]) -> None:
        """Raises ConfigurationError if there are fewer."""
        if count > len(self.served.adapters):
            raise ConfigurationError(
                f"The server has {len(self.served.adapters)} adapters, but the load asks for {count}. Publish more, "
                "or give --adapters, or --popularity none to ask the base alone."
            )

    def names(self, count: int, ranks: Sequence[int], on_progress: OnProgress = ignore_progress) -> list[str]:
        """The first `count`."""
        self.require(count, ranks)
        return list(self.served.adapters[:count])


@dataclass(frozen=True)
class Target:
    """A server that is ready for a load."""

    url: str
    model: str
    dialect: Dialect
    prompts: Prompts
    adapters: AdapterSource
    api_key: str | None = field(repr=False)
    pid: int | None
    command: tuple[str, ...] | None = None
    """With which it was started here."""


@contextmanager
def open_target(choice: ServerChoice, load: Load) -> Iterator[Target]:
    """The chosen server, with room for `load.num_adapters`; one of our own is stopped when the block ends.

    Raises:
        ConfigurationError: it cannot be reached or started, or is not what the load needs.
    """
    if choice.url is not None:
        yield running_target(choice, load)
        return
    base, kv_cache_memory = _demo() if choice.base is None else (choice.base, _DEFAULT_KV_CACHE_MEMORY)
    if not base.is_dir():
        raise ConfigurationError(f"--base {base} is not a directory.")
    num_requests = load.concurrency or load.requests
    needed = kv_cache_bytes(ModelConfig.from_directory(base), num_requests, load.prompt_tokens + load.output_tokens)
    with start_server(
        base,
        ("--kv-cache-memory", str(max(kv_cache_memory, needed)), *choice.serve_arguments),
        running_adapters=min(load.num_adapters, num_requests),
        max_rank=max(choice.ranks),
        targets=choice.targets,
        seed=load.seed,
    ) as server:
        yield Target(
            url=server.url,
            model=server.base_name,
            dialect=DIALECTS["openai"],
            prompts=_prompts(load, server.config.vocab_size, base),
            adapters=server.adapters,
            api_key=choice.key,
            pid=server.pid,
            command=server.command,
        )


def running_target(choice: ServerChoice, load: LoadTraits) -> Target:
    """The server at `choice.url`; raises ConfigurationError if it cannot be reached."""
    assert choice.url is not None
    url, dialect = choice.url, DIALECTS[choice.dialect]
    served = discover(dialect, url, choice.key)
    return Target(
        url=url,
        model=choice.model or served.model,
        dialect=dialect,
        prompts=_prompts(load, choice.vocab_size, choice.tokenizer),
        adapters=ServedAdapters(served),
        api_key=choice.key,
        pid=choice.server_pid,
    )


def _prompts(load: LoadTraits, vocab_size: int, tokenizer: Path | None) -> Prompts:
    if load.prompt_form == "ids":
        return TokenIdPrompts.of_vocabulary(vocab_size)
    if tokenizer is None:
        raise ConfigurationError("--prompt-form text needs --tokenizer, to make texts of a known length.")
    return TextPrompts(Tokenizer.from_directory(tokenizer))


def _demo() -> tuple[Path, int]:
    """The demo's base, and the bytes of a demo server's KV cache."""
    from onebase_server.demo import KV_CACHE_MEMORY, prepare_demo  # here, for it is needed with --demo only

    return prepare_demo().base, KV_CACHE_MEMORY
