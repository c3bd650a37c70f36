"""Timed trials as tables for the terminal and as fields for the JSON file."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.table import Table

from onebase_server.bench.kernels.measure import Measurements, TimedTrial
from onebase_server.bench.kernels.rooflines import Rooflines
from onebase_server.bench.kernels.workbench import Workbench

NONE = "-"
"""Where there is nothing to compare with, or nothing computed."""


def roofline_table(rooflines: Rooflines, bench: Workbench) -> Table:
    """What the machine can do at best."""
    table = Table(title=f"Measured on this {bench.device.type}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("memory", f"{rooflines.memory_bandwidth / 1e9:,.1f} GB/s")
    for dtype, rate in rooflines.gemm.items():
        table.add_row(f"product, {dtype}", f"{rate / 1e9:,.0f} GFLOP/s")
    table.add_row("last cache", f"{bench.cache_bytes / 2**20:,.0f} MiB")
    return table


def case_tables(trials: Sequence[TimedTrial], rooflines: Rooflines) -> Iterator[Table]:
    """A table for each op and shape, a line for each number of rows."""
    for (op, variant), of_case in groupby(trials, key=lambda trial: (trial.op, trial.variant)):
        yield _case_table(f"{op} {variant}".strip(), list(of_case), rooflines)


def describe(bench: Workbench, found: Measurements, rooflines: Rooflines) -> dict[str, Any]:
    """What was asked for, with the back end and the caches that were found, and all that was measured."""
    return {
        "options": bench.options.model_dump(mode="json"),
        "backend": bench.backend,
        "threads": bench.threads,
        "cache_bytes": bench.cache_bytes,
        "rooflines": _describe_rooflines(rooflines),
        "trials": [_describe_trial(trial, rooflines) for trial in found.trials],
        "failures": [asdict(failure) for failure in found.failures],
    }


def _describe_rooflines(rooflines: Rooflines) -> dict[str, Any]:
    """Bytes per second, by size of what is streamed again and again, and FLOPs per second."""
    return {
        "memory_bandwidth": rooflines.memory_bandwidth,
        "bandwidths": rooflines.bandwidths,
        "gemm": rooflines.gemm,
    }


def _describe_trial(trial: TimedTrial, rooflines: Rooflines) -> dict[str, Any]:
    """All figures of a trial; seconds, bytes and FLOPs are of one call."""
    return {
        **asdict(trial),
        "roofline_seconds": rooflines.seconds(trial.work),
        "cached_roofline_seconds": rooflines.cached_seconds(trial.work, trial.working_set),
    }


def _case_table(title: str, trials: Sequence[TimedTrial], rooflines: Rooflines) -> Table:
    backend, *peers = trials[0].timings
    table = Table(title=f"{title}, by {backend}", title_justify="left")
    headings = (
        *("rows", "µs", "lowest … highest", "MB", "MFLOP", "GB/s", "GFLOP/s"),
        *("of memory roofline", "of cache roofline", *(f"{peer} takes" for peer in peers)),
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for trial in trials:
        table.add_row(*_cells(trial, rooflines), *(f"{trial.slowness_of(peer):,.2f}-fold" for peer in peers))
    return table


def _cells(trial: TimedTrial, rooflines: Rooflines) -> Iterator[str]:
    timing, work = trial.timing, trial.work
    yield str(trial.rows)
    yield f"{timing.median * 1e6:,.1f}"
    yield f"{timing.lowest * 1e6:,.1f} … {timing.highest * 1e6:,.1f}"
    yield f"{work.bytes / 1e6:,.3f}"
    yield f"{work.flops / 1e6:,.2f}" if work.flops else NONE
    yield f"{work.bytes / timing.median / 1e9:,.1f}"
    yield f"{work.flops / timing.median / 1e9:,.1f}" if work.flops else NONE
    yield f"{rooflines.seconds(work) / timing.median:.0%}"
    yield f"{rooflines.cached_seconds(work, trial.working_set) / timing.median:.0%}"
