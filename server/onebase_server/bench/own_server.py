"""Our own server, started for a benchmark on a free port with a store of its own, and stopped afterwards."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from onebase_adapters.store import AdapterStore
from onebase_server.bench.random_adapters import num_parameters, write_random_adapter
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig
from onebase_server.progress import OnProgress, ignore_progress
from onebase_server.settings import EngineSettings

READY_SECONDS = 600
"""A large base is quantised before its server is ready for the first time."""
STOP_SECONDS = 40
LOG_LINES = 15
_NUMBER_BYTES = 2
"""Of an adapter, in the store (float16) as on the device (bfloat16), and of the KV cache."""


@dataclass
class RandomAdapters:
    """A store that gets a random adapter when it is asked for; a server may have the store open meanwhile."""

    store: AdapterStore
    config: ModelConfig
    seed: int
    targets: tuple[str, ...] = ()
    """The linears that they adapt; all if none is named."""
    _published: set[str] = field(default_factory=set)

    def require(self, count: int, ranks: Sequence[int]) -> None:
        """Raises ConfigurationError if the disk has no room for those that are not there yet."""
        missing = self._missing(count, ranks).values()
        needed = sum(num_parameters(self.config, rank, self.targets) for _, rank in missing) * _NUMBER_BYTES
        free = shutil.disk_usage(self.store.root).free
        if needed > 0.9 * free:
            raise ConfigurationError(
                f"{len(missing)} random adapters need {needed / 1e9:.1f} GB, but {self.store.root} has "
                f"{free / 1e9:.1f} GB free. Take fewer adapters or smaller --ranks, or let TMPDIR name a larger disk."
            )

    def names(self, count: int, ranks: Sequence[int], on_progress: OnProgress = ignore_progress) -> list[str]:
        """The names of `count` adapters, `ranks` in turn; those that are not there yet are published."""
        self.require(count, ranks)
        missing = self._missing(count, ranks)
        for done, (name, (index, rank)) in enumerate(missing.items(), start=1):
            with self.store.staging() as directory:
                seed = self.seed + index
                write_random_adapter(directory, self.config, rank=rank, seed=seed, targets=self.targets)
                self.store.publish(name, directory)
            self._published.add(name)
            on_progress(done, len(missing))
        return list(_numbers_and_ranks(count, ranks))

    def _missing(self, count: int, ranks: Sequence[int]) -> dict[str, tuple[int, int]]:
        wanted = _numbers_and_ranks(count, ranks)
        return {name: key for name, key in wanted.items() if name not in self._published}


@dataclass(frozen=True)
class OwnServer:
    """A running server of ours."""

    url: str
    pid: int
    command: tuple[str, ...]
    base_name: str
    config: ModelConfig
    adapters: RandomAdapters


def _numbers_and_ranks(count: int, ranks: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Number and rank of each of `count` adapters, by name."""
    return {f"random-{i}-rank-{ranks[i % len(ranks)]}": (i, ranks[i % len(ranks)]) for i in range(count)}


def kv_cache_bytes(config: ModelConfig, num_requests: int, request_tokens: int) -> int:
    """What so many requests at once need of the KV cache in its default form; less would measure waiting."""
    most_requests: int = EngineSettings.model_fields["max_num_seqs"].default
    block_size: int = EngineSettings.model_fields["block_size"].default
    tokens = min(num_requests, most_requests) * (request_tokens + block_size)  # a request's last block may be empty
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * _NUMBER_BYTES * tokens


@contextmanager
def start_server(
    base: Path, flags: Sequence[str], *, running_adapters: int, max_rank: int, targets: tuple[str, ...] = (), seed: int
) -> Iterator[OwnServer]:
    """Serve `base` until the block ends; its adapters and its log are deleted then.

    Adapter memory is what `running_adapters` of rank `max_rank` on `targets` need, at least the default, unless `flags`
    say otherwise: less would measure waiting.

    Raises:
        ConfigurationError: the base, a target or a flag is wrong. What the server itself says of it, and any that the
            block raises, ends with the server's own last words.
    """
    config = ModelConfig.from_directory(base)
    base_name = base.resolve().name
    default = EngineSettings.model_fields["adapter_memory"].default
    memory = max(default, running_adapters * num_parameters(config, max_rank, targets) * _NUMBER_BYTES)
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as workspace:
        root = Path(workspace)
        port = _free_port()
        command = (
            *(sys.executable, "-m", "onebase_server", "serve", "--base", str(base), "--base-name", base_name),
            *("--host", "127.0.0.1", "--port", str(port), "--store", str(root / "store")),
            *("--adapter-memory", str(memory), *flags),
        )
        store = AdapterStore.open(root / "store", config.adapter_layout(), base_name=base_name)
        try:
            with _running(command, root / "log") as process:
                url = f"http://127.0.0.1:{port}"
                _wait_until_ready(url, process)
                adapters = RandomAdapters(store, config, seed, targets)
                yield OwnServer(url, process.pid, command, base_name, config, adapters)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}\nThe server's last words:\n{_last_lines(root / 'log')}") from error
        finally:
            store.close()


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConfigurationError("The server did not start.")
        try:
            if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise ConfigurationError(f"The server was not ready after {READY_SECONDS} s.")


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
