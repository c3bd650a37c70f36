"""How throughput and latency change with the number of adapters, and with their rank."""

from collections.abc import Iterator
from dataclasses import dataclass

from onebase_server.bench.load import Load, Sweep
from onebase_server.bench.measure import Measurement, measure, request_progress
from onebase_server.bench.target import Target


@dataclass(frozen=True)
class Series:
    """Measurements that differ in one thing only."""

    varied: str
    """`adapters` (their number) or `rank`."""
    values: tuple[int, ...]
    measurements: tuple[Measurement, ...]


def measure_by_count(target: Target, load: Load, sweep: Sweep, ranks: tuple[int, ...]) -> Series:
    """The load on ever more adapters; where they are ours, each is published only when its number is reached."""
    counts = tuple(sorted(set(sweep.counts)))
    loads = [load.model_copy(update={"adapters": count}) for count in counts]
    return Series("adapters", counts, tuple(_measure_each(target, loads, [ranks] * len(loads))))


def measure_by_rank(target: Target, load: Load, ranks: tuple[int, ...]) -> Series:
    """The load on adapters that all have one rank."""
    ranks = tuple(sorted(set(ranks)))
    return Series("rank", ranks, tuple(_measure_each(target, [load] * len(ranks), [(rank,) for rank in ranks])))


def _measure_each(target: Target, loads: list[Load], ranks: list[tuple[int, ...]]) -> Iterator[Measurement]:
    with request_progress("Requests", *loads) as on_answer:
        for load, ranks_of_load in zip(loads, ranks, strict=True):
            yield measure(target, load, target.adapters.names(load.num_adapters, ranks_of_load), on_answer)
