"""Measurements as PNG plots, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from onebase_server.bench.comparison import LoadComparison
from onebase_server.bench.measure import Measurement
from onebase_server.bench.results_file import DOTS_PER_INCH
from onebase_server.bench.scale import Series
from onebase_server.bench.summary import inter_token_seconds

Array = NDArray[np.float64]


def plot_latencies(path: Path, measurement: Measurement) -> None:
    """What share of first tokens, of gaps between chunks and of answers took at most how long; all runs together."""
    answers = [answer for answer in measurement.answers if answer.error is None]
    panels = {
        "time to first token": [a.chunk_times[0] - a.sent_at for a in answers if a.chunk_times],
        "inter-token latency": inter_token_seconds(answers),
        "end-to-end latency": [a.ended_at - a.sent_at for a in answers],
    }
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (title, seconds) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        if seconds:
            axes.ecdf(np.multiply(seconds, 1e3))
        axes.set(title=title, xlabel="milliseconds")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share")
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_series(path: Path, series: Series) -> None:
    """Throughput, with bars for the range over the runs, and the 99th percentiles, against what was varied."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    _plot_throughput(throughput, series)
    _plot_p99(latency, series)
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_xticks(series.values, labels=map(str, series.values))
        axes.minorticks_off()
        axes.set_xlabel(series.varied)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_comparison(path: Path, comparisons: Sequence[LoadComparison]) -> None:
    """Throughput: a group of bars for each load, a colour for each server, thin bars for the range over the runs."""
    servers = list(dict.fromkeys(name for comparison in comparisons for name in comparison.measurements))
    width = 0.8 / max(len(servers), 1)
    figure = Figure(figsize=(max(6, 0.6 * len(servers) * len(comparisons)), 4), layout="constrained")
    axes = figure.subplots()
    for number, server in enumerate(servers):
        measured = {i: c.measurements[server] for i, c in enumerate(comparisons) if server in c.measurements}
        medians, below, above = _throughput_ranges(list(measured.values()))
        places = np.array(list(measured)) + (number - (len(servers) - 1) / 2) * width
        bars = axes.bar(places, medians, width, yerr=(below, above), capsize=2, label=server)
        axes.bar_label(bars, fmt="%.0f", fontsize="small")
    axes.set_xticks(range(len(comparisons)), labels=[comparison.name for comparison in comparisons])
    axes.set(xlabel="load (streams : adapters)", ylabel="output tokens/s")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _plot_throughput(axes: Axes, series: Series) -> None:
    medians, below, above = _throughput_ranges(series.measurements)
    axes.errorbar(series.values, medians, yerr=(below, above), marker="o", capsize=3)
    axes.set_ylabel("output tokens/s")


def _throughput_ranges(measurements: Sequence[Measurement]) -> tuple[Array, Array, Array]:
    """Medians of output tokens/s, and how far the lowest run is below and the highest above."""
    medians = np.array([m.median.output_tokens_per_second for m in measurements])
    lowest = np.array([min(run.output_tokens_per_second for run in m.runs) for m in measurements])
    highest = np.array([max(run.output_tokens_per_second for run in m.runs) for m in measurements])
    return medians, medians - lowest, highest - medians


def _plot_p99(axes: Axes, series: Series) -> None:
    named = {
        "inter-token latency": [m.median.inter_token_latency for m in series.measurements],
        "time to first token": [m.median.time_to_first_token for m in series.measurements],
    }
    for name, percentiles in named.items():
        axes.plot(series.values, [np.nan if p is None else p.p99 * 1e3 for p in percentiles], marker="o", label=name)
    axes.set_ylabel("p99, milliseconds")
    axes.legend()
