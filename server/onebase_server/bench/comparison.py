"""Several servers under the same loads, a run of each in turn, so that a noisy machine's drift hits all alike.

All of them stay up meanwhile: one that is started anew for each run would be measured cold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import sleep

from onebase_server.bench.idle_watch import IdleWatch
from onebase_server.bench.load import Load
from onebase_server.bench.measure import LoadRunner, Measurement, request_progress
from onebase_server.bench.target import Target
from onebase_server.errors import ConfigurationError


@dataclass(frozen=True)
class LoadComparison:
    """What one load measured on each server."""

    load: Load
    reference: str
    """The server that was named first; ratios are its throughput as a multiple of another's."""
    measurements: dict[str, Measurement]
    """By server, in the order in which they were named."""
    left_out: dict[str, str]
    """Servers that did not take the load, and why."""
    idle_notes: tuple[str, ...]
    """Sentences on servers that were busy while others were measured."""

    @property
    def name(self) -> str:
        """As `--loads` names it."""
        return f"{self.load.concurrency}:{self.load.popularity}"

    @property
    def ratios(self) -> dict[str, float]:
        """The reference's median output tokens/s over each other server's; empty if the reference was left out."""
        if self.reference not in self.measurements:
            return {}
        speeds = {name: one.median.output_tokens_per_second for name, one in self.measurements.items()}
        own = speeds.pop(self.reference)
        return {name: own / speed for name, speed in speeds.items()}

    @property
    def best_other(self) -> str | None:
        """The fastest server beside the reference; None where there is no ratio."""
        ratios = self.ratios
        return min(ratios, key=lambda name: ratios[name], default=None)

    @property
    def notes(self) -> list[str]:
        """All that a reader of the figures must know, each sentence with the load and the server that it is about."""
        about = [(name, f"left out. {why}") for name, why in self.left_out.items()]
        about += [(name, note) for name, measurement in self.measurements.items() for note in measurement.notes]
        return [
            *(f"{self.name}, {name}: {note}" for name, note in about),
            *(f"{self.name}: {n}" for n in self.idle_notes),
        ]


def compare(targets: Mapping[str, Target], loads: Sequence[Load], settle_seconds: float) -> Iterator[LoadComparison]:
    """Put all servers under each load; one that has too few adapters for it, or answers nothing, is left out of it.

    Before each run nothing is sent for `settle_seconds`.

    Raises:
        ConfigurationError: a target's `pid` is no process here.
    """
    entries = [_Entry.of(load, targets) for load in loads]
    first_run = 1  # counted on over the loads, so that no two of them share a prompt, which a prefix cache would find
    with request_progress("Requests", *(entry.load for entry in entries for _ in entry.adapters)) as on_answer:
        for entry in entries:
            yield _measure_in_turn(entry, targets, first_run, settle_seconds, on_answer)
            first_run += entry.load.runs


@dataclass(frozen=True)
class _Entry:
    """Who takes a load."""

    load: Load
    adapters: dict[str, list[str]]
    """By server, those that the load asks for."""
    left_out: dict[str, str]

    @classmethod
    def of(cls, load: Load, targets: Mapping[str, Target]) -> "_Entry":
        entry = cls(load, {}, {})
        for name, target in targets.items():
            try:
                entry.adapters[name] = target.adapters.names(load.num_adapters, ())
            except ConfigurationError as error:
                entry.left_out[name] = str(error)
        return entry


def _measure_in_turn(
    entry: _Entry,
    targets: Mapping[str, Target],
    first_run: int,
    settle_seconds: float,
    on_answer: Callable[[], None],
) -> LoadComparison:
    load, left_out = entry.load, dict(entry.left_out)
    idle_watch = IdleWatch({name: target.pid for name, target in targets.items() if target.pid})
    runners: dict[str, LoadRunner] = {}
    for name, adapters in entry.adapters.items():
        runner = LoadRunner(targets[name], load, adapters, on_answer)
        try:
            runner.warm_up()
            runners[name] = runner
        except ConfigurationError as error:
            left_out[name] = str(error)
    for number in range(first_run, first_run + load.runs):
        for name, runner in runners.items():
            sleep(settle_seconds)
            with idle_watch.while_measuring(name):
                runner.run(number)
    measurements: dict[str, Measurement] = {}
    for name, runner in runners.items():
        try:
            measurements[name] = runner.measurement()
        except ConfigurationError as error:
            left_out[name] = str(error)
    return LoadComparison(load, next(iter(targets)), measurements, left_out, tuple(idle_watch.notes()))
