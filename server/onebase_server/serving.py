"""`onebase serve` at work: makes the collaborators, runs the HTTP server, tells the operator what there is.

The one place where the API, the engine, the store and the tokenizer of a running server are put together.
"""

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape

import onebase_server
from onebase_adapters.store import AdapterStore
from onebase_server.api.app import create_app
from onebase_server.engine.client import EngineClient
from onebase_server.engine.request import EngineMemory
from onebase_server.errors import ConfigurationError
from onebase_server.metrics import Metrics, memory_parts
from onebase_server.model.config import ModelConfig
from onebase_server.model.hub import resolve_base
from onebase_server.model.tokenizer import Tokenizer, read_base_tokenizer
from onebase_server.model.weight_report import WeightReport
from onebase_server.process_memory import return_free_memory
from onebase_server.settings import Settings

GRACE_SECONDS = 30
"""How long running requests may go on after SIGTERM."""


def run_server(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigurationError, StoreError: something is wrong with the base, the store or a setting.
    """
    started = time.perf_counter()
    _configure_logging(settings.log_level)
    settings = with_local_base(settings)
    with open_store(settings) as store:
        metrics = new_metrics(settings)
        engine = EngineClient(settings.engine, on_stats=metrics.on_stats, on_restart=metrics.on_restart)
        tokenizer = Tokenizer.from_directory(Path(settings.base))
        return_free_memory()
        app = create_app(settings, engine=engine, store=store, tokenizer=tokenizer, metrics=metrics)
        server = OnebaseServer(settings, app, Announcer(settings, engine, store, started))
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    if server.failure is not None:
        raise server.failure


def with_local_base(settings: Settings) -> Settings:
    """The settings with a hub id replaced by its local directory; the id stays the base's name."""
    directory = resolve_base(settings.base, settings.revision, settings.cache_dir)
    is_local = directory == Path(settings.base).expanduser()
    name = settings.base_name if is_local else settings.base_name or settings.base
    return settings.model_copy(update={"base": str(directory), "base_name": name})


@contextlib.contextmanager
def open_store(settings: Settings) -> Iterator[AdapterStore]:
    """The adapter store, made for this base if it is not there yet; raises StoreError if it is for another."""
    base = Path(settings.base)
    store = AdapterStore.open(
        settings.store,
        ModelConfig.from_directory(base).adapter_layout(),
        base_name=settings.served_name,
        base_tokenizer=read_base_tokenizer(base),
        base_directory=base,
        max_rank=settings.max_lora_rank,
        max_upload_bytes=settings.max_upload_bytes,
    )
    try:
        yield store
    finally:
        store.close()


def new_metrics(settings: Settings) -> Metrics:
    """Metrics labelled for this server."""
    return Metrics(
        base_name=settings.served_name,
        adapter_labels=settings.adapter_metric_labels,
        max_adapters=settings.max_num_seqs,  # at most one different adapter per sequence of a step
    )


class Announcer:
    """Tells the operator, on stderr, what is served and when it can be used."""

    def __init__(self, settings: Settings, engine: EngineClient, store: AdapterStore, started: float) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._started = started
        self._console = Console(stderr=True, highlight=False)

    async def announce(self, address: str) -> None:
        """Say what is served at `address`, then wait for the engine; raises ConfigurationError if it cannot start."""
        names = [version.name for version in self._store.list_adapters()]
        self._say(
            f"[bold]Onebase {onebase_server.__version__}[/] on [bold]{address}[/], documentation at {address}/docs"
        )
        self._say(f"  base      {self._settings.served_name} in {self._settings.base}")
        self._say(f"  adapters  {_enumerate(names)} in {self._settings.store}")
        self._say(f"  keys      {self._describe_keys()}")
        self._say("Loading the base …")
        ready = await self._engine.wait_ready()
        self._say(
            f"[bold green]Ready[/] after {time.perf_counter() - self._started:.1f} s "
            f"with a context of {ready.max_model_len} tokens."
        )
        self._say(f"  weights   {_describe_weights(ready.weights)}")
        self._say(f"  error     {_describe_error(ready.weights)}")
        self._say(f"  memory    {_describe_memory(ready.stats.memory)}")
        self._say("Try:")
        self._say(_example(address, names[0] if names else self._settings.served_name))

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _describe_keys(self) -> str:
        is_set = (self._settings.api_key is not None, self._settings.admin_key is not None)
        generation, adapters = ("needs a key" if has_key else "is open" for has_key in is_set)
        return f"generation {generation}, publishing {adapters}"


class OnebaseServer(uvicorn.Server):
    """uvicorn, which also announces itself once it listens, and stops if the engine can never start."""

    def __init__(self, settings: Settings, app: FastAPI, announcer: Announcer) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                http="httptools",
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self.failure: ConfigurationError | None = None
        self._announcer = announcer
        self._announcing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then announce it beside serving."""
        await super().startup(sockets)
        self._announcing = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        try:
            await self._announcer.announce(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        except ConfigurationError as error:
            self.failure = error
            self.should_exit = True


def _configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(levelname)s: %(message)s")
    if level != "debug":  # uvicorn's own start-up lines say less than the announcement
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def _describe_weights(report: WeightReport) -> str:
    """`134 MiB: linears 52 (4.127 bits a parameter), embedding and head 54, its screen 28, norms and biases 0`."""
    parts = (report.linear_bytes, report.embedding_bytes, report.screen_bytes, report.other_bytes, report.total_bytes)
    linears, head, screen, others, total = (f"{size / 2**20:,.0f}" for size in parts)
    its_screen = f", its screen {screen}" if report.screen_bytes else ""
    return (
        f"{total} MiB: linears {linears} ({report.bits_per_parameter:.3f} bits a parameter), "
        f"embedding and head {head}{its_screen}, norms and biases {others}"
    )


def _describe_error(report: WeightReport) -> str:
    """`9.25 % of the weights, most in layers.0.self_attn.k_proj (9.71 %), …`, or why there is none to tell."""
    if report.error is None:
        return "unknown: the checkpoint came quantised" if report.is_quantized else "none: nothing is quantised"
    worst = ", ".join(f"{e.name.removeprefix('model.')} ({e.relative:.2%})" for e in report.error.worst)
    return f"{report.error.relative:.2%} of the weights, most in {worst}"


def _describe_memory(memory: EngineMemory) -> str:
    """`470 MiB: weights 106, KV cache 1, …`."""
    parts = memory_parts(memory)
    mebibytes = {part: f"{count / 2**20:,.0f}" for part, count in parts.items()}
    return (
        f"{sum(parts.values()) / 2**20:,.0f} MiB: weights {mebibytes['weights']}, KV cache {mebibytes['kv_cache']}, "
        f"adapters {mebibytes['adapters']}, activations {mebibytes['activations']}, runtime {mebibytes['runtime']}, "
        f"API {mebibytes['api']}"
    )


def _enumerate(names: list[str]) -> str:
    """`3 (pirate, shakespeare, extractor)`, cut short where there are many."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} ({shown})" if names else "none yet"


def _example(address: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}]})
    return f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{escape(body)}'"
