"""Watches the servers that are up but not measured: what they use is missing from the one that is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

from onebase_server.bench.processes import cpu_seconds, find_process

WORTH_SAYING_CPU_SHARE = 0.05


class IdleWatch:
    """Keeps, for each server, the largest share of a core that it used while another one was measured."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        """Watch these processes, by the server's name; raises ConfigurationError if one is not there."""
        self._processes = {name: find_process(pid) for name, pid in pids.items()}
        self._shares = dict.fromkeys(pids, 0.0)

    @contextmanager
    def while_measuring(self, measured: str) -> Iterator[None]:
        """Watch all but the measured server until the block ends."""
        idle = {name: process for name, process in self._processes.items() if name != measured}
        before = {name: cpu_seconds(process) for name, process in idle.items()}
        started = perf_counter()
        yield
        elapsed = perf_counter() - started
        for name, process in idle.items():
            share = (cpu_seconds(process) - before[name]) / elapsed
            self._shares[name] = max(self._shares[name], share)

    def notes(self) -> Iterator[str]:
        """A sentence on each server that was not idle enough."""
        for name, share in self._shares.items():
            if share > WORTH_SAYING_CPU_SHARE:
                yield f"{name} used up to {share:.0%} of a core while another server was measured."
