"""How throughput and latency change with the number of adapters, and with their rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onebase_server.bench.load import Load, Sweep
from onebase_server.bench.measure import Measurement, measure, request_progress
from onebase_server.bench.target import Target
from onebase_server.progress import step_progress


@dataclass(frozen=True)
class Series:
    """Measurements that differ in one thing only."""

    varied: str
    """`adapters` (their number) or `rank`."""
    values: tuple[int, ...]
    measurements: tuple[Measurement, ...]


def measure_by_count(target: Target, load: Load, sweep: Sweep, ranks: tuple[int, ...]) -> Iterator[Series]:
    """The load on ever more adapters; where they are ours, each is published only when its number is reached.

    Yields what was measured so far, after each number. Raises ConfigurationError at once if there cannot be as many.
    """
    counts = tuple(sorted(set(sweep.counts)))
    target.adapters.require(counts[-1], ranks)
    loads = [load.model_copy(update={"adapters": count}) for count in counts]
    yield from _growing("adapters", counts, _measure_each(target, loads, [ranks] * len(loads)))


def measure_by_rank(target: Target, load: Load, ranks: tuple[int, ...]) -> Iterator[Series]:
    """The load on adapters that all have one rank; yields what was measured so far, after each rank."""
    ranks = tuple(sorted(set(ranks)))
    of_one_rank = [(rank,) for rank in ranks]
    yield from _growing("rank", ranks, _measure_each(target, [load] * len(ranks), of_one_rank))


def _growing(varied: str, values: Sequence[int], measured: Iterator[Measurement]) -> Iterator[Series]:
    measurements: tuple[Measurement, ...] = ()
    for measurement in measured:
        measurements = (*measurements, measurement)
        yield Series(varied, tuple(values[: len(measurements)]), measurements)


def _measure_each(target: Target, loads: Sequence[Load], ranks: Sequence[tuple[int, ...]]) -> Iterator[Measurement]:
    for number, (load, ranks_of_load) in enumerate(zip(loads, ranks, strict=True), start=1):
        with step_progress("Publishing adapters") as on_progress:
            adapters = target.adapters.names(load.num_adapters, ranks_of_load, on_progress)
        with request_progress(f"Requests, load {number} of {len(loads)}", load) as on_answer:
            yield measure(target, load, adapters, on_answer)
