"""How throughput and latency change with the number of adapters, and with their rank.

The loads take turns, a run of each, so that a noisy machine's drift hits all alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onebase_server.bench.load import Load, Sweep
from onebase_server.bench.measure import LoadRunner, Measurement, request_progress
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
    """The load on ever more adapters, of which all are registered from the start.

    Yields what was measured so far, after each round. Raises ConfigurationError at once if there cannot be as many.
    """
    counts = tuple(sorted(set(sweep.counts)))
    target.adapters.require(counts[-1], ranks)
    loads = [load.model_copy(update={"adapters": count}) for count in counts]
    yield from _measure_in_turn("adapters", counts, target, loads, [ranks] * len(loads))


def measure_by_rank(target: Target, load: Load, ranks: tuple[int, ...]) -> Iterator[Series]:
    """The load on adapters that all have one rank; yields what was measured so far, after each round."""
    ranks = tuple(sorted(set(ranks)))
    yield from _measure_in_turn("rank", ranks, target, [load] * len(ranks), [(rank,) for rank in ranks])


def _measure_in_turn(
    varied: str, values: tuple[int, ...], target: Target, loads: Sequence[Load], ranks: Sequence[tuple[int, ...]]
) -> Iterator[Series]:
    adapters = _publish(target, loads, ranks)
    with request_progress(f"Requests by {varied}", *loads) as on_answer:
        runners = [LoadRunner(target, load, names, on_answer) for load, names in zip(loads, adapters, strict=True)]
        for turn in range(loads[0].runs):
            for place, runner in enumerate(runners):
                if turn == 0:
                    runner.warm_up()
                # counted on over all loads, so that none repeats a prompt, which the prefix cache would find
                runner.run(turn * len(runners) + place + 1)
            yield Series(varied, values, tuple(runner.measurement() for runner in runners))


def _publish(target: Target, loads: Sequence[Load], ranks: Sequence[tuple[int, ...]]) -> list[list[str]]:
    """The adapters that each load asks for; those that are not there yet are published."""
    adapters = []
    for load, ranks_of_load in zip(loads, ranks, strict=True):
        with step_progress("Publishing adapters") as on_progress:
            adapters.append(target.adapters.names(load.num_adapters, ranks_of_load, on_progress))
    return adapters
