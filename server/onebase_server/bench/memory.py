"""Memory of a server's processes, watched while a load runs. It needs psutil and permission to look at them.

By part (weights, KV cache and so on) is what the server says itself, if it is Onebase.
"""

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from onebase_server.bench.processes import find_process, process_tree

WATCH_SECONDS = 3.0
MAX_COMMAND_LENGTH = 160
PARTS_METRIC = "onebase_memory_bytes"


@dataclass(frozen=True)
class ProcessMemory:
    """One process, at one time; bytes."""

    pid: int
    command: str
    rss: int
    """Resident, pages that it shares with others included."""
    pss: int | None
    """Resident, each shared page divided by the number of those who share it; None where the system does not tell."""


@dataclass(frozen=True)
class TreeMemory:
    """A process and all its descendants, at one time."""

    processes: tuple[ProcessMemory, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    """All processes' memory by part, as the server said after the last run; empty for other servers."""

    @property
    def rss(self) -> int:
        """The sum; it counts pages twice that two processes share."""
        return sum(process.rss for process in self.processes)

    @property
    def pss(self) -> int | None:
        """The sum, which counts every page once; None if one of the processes has none."""
        known = [process.pss for process in self.processes if process.pss is not None]
        return sum(known) if len(known) == len(self.processes) else None


class MemoryWatch:
    """Looks at a process tree every few seconds and keeps the moment at which it was largest."""

    def __init__(self, pid: int, url: str) -> None:
        """Raises ConfigurationError if there is no such process; `url` is the server's address."""
        self._root = find_process(pid)
        self._url = url
        self.peak = TreeMemory()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch until the block ends."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._look()
            self.peak = replace(self.peak, parts=read_parts(self._url))

    async def _watch(self) -> None:
        while True:
            await asyncio.to_thread(self._look)  # the kernel walks page tables, which would hold up the load
            await asyncio.sleep(WATCH_SECONDS)

    def _look(self) -> None:
        now = measure_tree(self._root)
        if now.rss > self.peak.rss:
            self.peak = now


def read_parts(url: str) -> dict[str, int]:
    """Bytes by part out of a server's metrics; none where it has no such metric, or no metrics at all."""
    try:
        text = httpx.get(f"{url}/metrics").raise_for_status().text
        families = [family for family in text_string_to_metric_families(text) if family.name == PARTS_METRIC]
    except (httpx.HTTPError, ValueError):  # ValueError: what it has there is not Prometheus' format
        return {}
    return {sample.labels["part"]: int(sample.value) for family in families for sample in family.samples}


def measure_tree(root: psutil.Process) -> TreeMemory:
    """What a process and its descendants hold now; those that end meanwhile hold nothing."""
    processes = []
    for process in process_tree(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(_measure(process))
    return TreeMemory(tuple(processes))


def _measure(process: psutil.Process) -> ProcessMemory:
    rss = process.memory_info().rss
    try:
        pss = getattr(process.memory_full_info(), "pss", None)  # Linux only
        command = shlex.join([process.name(), *process.cmdline()[1:]])
    except psutil.AccessDenied:
        pss, command = None, process.name()
    return ProcessMemory(process.pid, command[:MAX_COMMAND_LENGTH], rss, pss)
