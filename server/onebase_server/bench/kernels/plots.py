"""Timed trials as PNG plots: what was achieved by rows, under the rooflines."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onebase_server.bench.kernels.measure import TimedTrial
from onebase_server.bench.kernels.rooflines import Rooflines
from onebase_server.bench.results_file import DOTS_PER_INCH


def plot_op(path: Path, trials: Sequence[TimedTrial], rooflines: Rooflines) -> None:
    """One op, a panel for each of its shapes: GFLOP/s where it multiplies, GB/s where it moves numbers."""
    panels = [list(of_case) for _, of_case in groupby(trials, key=lambda trial: trial.variant)]
    figure = Figure(figsize=(4 * len(panels) + 2, 3.8), layout="constrained")
    for axes, of_case in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _plot_case(axes, of_case, rooflines)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _plot_case(axes: Axes, trials: Sequence[TimedTrial], rooflines: Rooflines) -> None:
    multiplies = any(trial.work.flops > trial.work.bytes for trial in trials)
    amounts = [(trial.work.flops if multiplies else trial.work.bytes) / 1e9 for trial in trials]
    seconds = {name: [trial.timings[name].median for trial in trials] for name in trials[0].timings}
    memory = [rooflines.seconds(trial.work) for trial in trials]
    cache = [rooflines.cached_seconds(trial.work, trial.working_set) for trial in trials]
    rows = [trial.rows for trial in trials]
    for name, times in seconds.items():
        axes.plot(rows, np.divide(amounts, times), marker="o", label=name)
    axes.plot(rows, np.divide(amounts, memory), linestyle="--", color="gray", label="memory roofline")
    axes.plot(rows, np.divide(amounts, cache), linestyle=":", color="gray", label="cache roofline")
    axes.set(title=f"{trials[0].op} {trials[0].variant}", xlabel="rows", ylabel="GFLOP/s" if multiplies else "GB/s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(rows, labels=map(str, rows))
    axes.grid(alpha=0.3)
