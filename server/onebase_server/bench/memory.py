"""Memory of a server's processes, watched while a load runs. It needs psutil and permission to look at them."""

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass

import psutil

from onebase_server.bench.processes import find_process, process_tree

WATCH_SECONDS = 3.0
MAX_COMMAND_LENGTH = 160


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

    def __init__(self, pid: int) -> None:
        self._root = find_process(pid)
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

    async def _watch(self) -> None:
        while True:
            await asyncio.to_thread(self._look)  # the kernel walks page tables, which would hold up the load
            await asyncio.sleep(WATCH_SECONDS)

    def _look(self) -> None:
        now = measure_tree(self._root)
        if now.rss > self.peak.rss:
            self.peak = now


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
