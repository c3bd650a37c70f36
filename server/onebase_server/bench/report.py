"""Measurements as tables for the terminal and as fields for the JSON file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from onebase_server.bench.comparison import LoadComparison
from onebase_server.bench.measure import Measurement
from onebase_server.bench.memory import TreeMemory
from onebase_server.bench.scale import Series
from onebase_server.bench.server_choice import ServerChoice
from onebase_server.bench.summary import Percentiles, RunSummary
from onebase_server.bench.target import Target

UNKNOWN = "?"

_THROUGHPUT = {
    "output tokens/s": "output_tokens_per_second",
    "total tokens/s": "total_tokens_per_second",
    "requests/s": "requests_per_second",
    "wall seconds": "wall_seconds",
    "client cpu seconds": "client_cpu_seconds",
}


def throughput_table(measurement: Measurement) -> Table:
    """The medians, with the range over the runs."""
    table = Table(title=f"Runs: {measurement.load.runs}", title_justify="left")
    table.add_column("")
    for heading in ("median", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for name, field in _THROUGHPUT.items():
        values = [getattr(run, field) for run in measurement.runs]
        median = getattr(measurement.median, field)
        table.add_row(name, *(f"{value:,.2f}" for value in (median, min(values), max(values))))
    return table


def latency_table(median: RunSummary) -> Table:
    """Percentiles in milliseconds."""
    table = Table(title="Milliseconds", title_justify="left")
    table.add_column("")
    for heading in ("p50", "p90", "p99"):
        table.add_column(heading, justify="right")
    for name, percentiles in _latencies(median):
        table.add_row(name, *map(_milliseconds, (percentiles.p50, percentiles.p90, percentiles.p99)))
    return table


def memory_table(memory: TreeMemory) -> Table:
    """By process, in MiB."""
    table = Table(title="Memory at its largest, MiB", title_justify="left", show_footer=True)
    table.add_column("process", footer="all", overflow="ellipsis", max_width=60, no_wrap=True)
    table.add_column("RSS", footer=_mebibytes(memory.rss), justify="right")
    table.add_column("PSS", footer=_mebibytes(memory.pss), justify="right")
    for process in memory.processes:
        table.add_row(process.command, _mebibytes(process.rss), _mebibytes(process.pss))
    return table


def parts_table(parts: Mapping[str, int]) -> Table:
    """By what it is for, in MiB."""
    table = Table(title="Memory by part, MiB", title_justify="left", show_footer=True)
    table.add_column("part", footer="all")
    table.add_column("", footer=_mebibytes(sum(parts.values())), justify="right")
    for part, count in parts.items():
        table.add_row(part, _mebibytes(count))
    return table


def describe_target(target: Target) -> dict[str, Any]:
    """Which server it was; no keys."""
    return {"url": target.url, "model": target.model, "command": target.command}


def describe_adapters(choice: ServerChoice) -> dict[str, Any] | None:
    """What the random adapters of a server of our own are; None for another's."""
    return choice.model_dump(include={"ranks", "targets"}) if choice.url is None else None


def describe_measurement(measurement: Measurement) -> dict[str, Any]:
    """All figures of a measurement."""
    memory = measurement.memory
    return {
        "load": measurement.load.model_dump(),
        "median": asdict(measurement.median),
        "runs": [asdict(run) for run in measurement.runs],
        "memory": memory and {"rss": memory.rss, "pss": memory.pss, **asdict(memory)},
        "notes": measurement.notes,
    }


def series_table(series: Series) -> Table:
    """A line for each value of what was varied."""
    table = Table(title=f"Medians by {series.varied}; times in milliseconds", title_justify="left")
    latencies = ("TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "latency p99")
    for name in (series.varied, "tokens/s", *latencies, "PSS MiB"):
        table.add_column(name, justify="right")
    for value, measurement in zip(series.values, series.measurements, strict=True):
        median, memory = measurement.median, measurement.memory
        ttft, itl = median.time_to_first_token, median.inter_token_latency
        table.add_row(
            str(value),
            f"{median.output_tokens_per_second:,.2f}",
            *((_milliseconds(ttft.p50), _milliseconds(ttft.p99)) if ttft else (UNKNOWN, UNKNOWN)),
            *((_milliseconds(itl.p50), _milliseconds(itl.p99)) if itl else (UNKNOWN, UNKNOWN)),
            _milliseconds(median.latency.p99),
            _mebibytes(memory.pss if memory else None),
        )
    return table


def describe_series(series: Series) -> dict[str, Any]:
    """All figures of a series, in the order of its values."""
    points = zip(series.values, series.measurements, strict=True)
    return {"varied": series.varied, "points": [{"value": v, **describe_measurement(m)} for v, m in points]}


def comparison_table(comparisons: Sequence[LoadComparison]) -> Table:
    """A line for each server under each load, and one for the ratio to the best of the others."""
    reference = comparisons[0].reference
    table = Table(title="Medians; times in milliseconds", title_justify="left")
    for name in ("load", "server"):
        table.add_column(name)
    for name in ("tokens/s", "range", f"{reference} is", "TTFT p50", "ITL p50", "PSS MiB"):
        table.add_column(name, justify="right")
    for comparison in comparisons:
        table.add_section()
        for name, measurement in comparison.measurements.items():
            table.add_row(comparison.name, name, *_comparison_cells(measurement, comparison.ratios.get(name)))
        best = comparison.best_other
        if best is not None and len(comparison.ratios) > 1:
            table.add_row(comparison.name, "best other", "", "", _times(comparison.ratios[best]))
    return table


def describe_comparison(comparison: LoadComparison) -> dict[str, Any]:
    """All figures of a load, by server."""
    servers = {
        name: {"ratio": comparison.ratios.get(name), **describe_measurement(measurement)}
        for name, measurement in comparison.measurements.items()
    }
    return {
        "name": comparison.name,
        "reference": comparison.reference,
        "best_other": comparison.best_other,
        "servers": servers,
        "left_out": comparison.left_out,
        "idle_notes": comparison.idle_notes,
    }


def _comparison_cells(measurement: Measurement, ratio: float | None) -> Iterator[str]:
    median, memory = measurement.median, measurement.memory
    speeds = [run.output_tokens_per_second for run in measurement.runs]
    yield f"{median.output_tokens_per_second:,.1f}"
    yield f"{min(speeds):,.0f}-{max(speeds):,.0f}"
    yield "" if ratio is None else _times(ratio)
    for percentiles in (median.time_to_first_token, median.inter_token_latency):
        yield _milliseconds(percentiles.p50) if percentiles else UNKNOWN
    yield _mebibytes(memory.pss if memory else None)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _latencies(summary: RunSummary) -> Iterator[tuple[str, Percentiles]]:
    named = {
        "time to first token": summary.time_to_first_token,
        "inter-token latency": summary.inter_token_latency,
        "time per output token": summary.time_per_output_token,
        "end-to-end latency": summary.latency,
    }
    yield from ((name, percentiles) for name, percentiles in named.items() if percentiles is not None)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _mebibytes(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count / 2**20:,.0f}"
