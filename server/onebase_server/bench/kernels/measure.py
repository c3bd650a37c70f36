"""Times the cases of a workbench one after another, and measures the rooflines that they are held against."""

import gc
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

import onebase_kernels as kernels
from onebase_server.bench.kernels import cuda_timing, timing
from onebase_server.bench.kernels.caches import free_bytes, last_level_cache_bytes
from onebase_server.bench.kernels.cases import Case
from onebase_server.bench.kernels.options import KernelOptions
from onebase_server.bench.kernels.rooflines import Rooflines
from onebase_server.bench.kernels.timing import Clock, MakeBurst, Timing
from onebase_server.bench.kernels.trial import Work
from onebase_server.bench.kernels.workbench import Workbench
from onebase_server.model.backend import use_kernels
from onebase_server.model.config import ModelConfig
from onebase_server.progress import OnProgress


@dataclass(frozen=True)
class TimedTrial:
    """What was measured of one op on one shape and number of rows."""

    op: str
    variant: str
    rows: int
    work: Work
    working_set: int
    timings: dict[str, Timing]
    """By contender; the first is the back end that the others are compared with."""

    @property
    def timing(self) -> Timing:
        """Of the first contender."""
        return next(iter(self.timings.values()))

    def slowness_of(self, contender: str) -> float:
        """How many times as long as the first contender another takes."""
        return self.timings[contender].median / self.timing.median


@dataclass(frozen=True)
class Failure:
    """What an op raised on one shape and number of rows; the case's later numbers of rows were not tried."""

    op: str
    variant: str
    rows: int
    error: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.op} {self.variant}".strip() + f" failed at {self.rows} rows: {self.error}"


@dataclass
class Measurements:
    """What there is so far."""

    trials: list[TimedTrial] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def set_up(config: ModelConfig, options: KernelOptions, device: torch.device) -> Workbench:
    """A workbench on that device, with the back end and the threads that the options ask for.

    Raises:
        ConfigurationError: the back end cannot run here.
    """
    backend = use_kernels(options.kernels, device)
    threads = options.threads or len(os.sched_getaffinity(0))
    bench = Workbench(config, options, device, backend, threads, last_level_cache_bytes(device), free_bytes(device))
    for name in bench.rivals("reference", "bitsandbytes"):
        kernels.use_backend(name, device.type)
        kernels.set_num_threads(threads)
    return bench


def rooflines_of(bench: Workbench) -> Rooflines:
    """Those of its device; nothing is measured yet."""
    clock, _ = how_to_time(bench)
    return Rooflines(bench.device, bench.cache_bytes, bench.free_bytes, clock)


@torch.inference_mode()
def measure_cases(
    bench: Workbench,
    cases: Sequence[Case],
    rooflines: Rooflines,
    on_progress: OnProgress,
    on_case: Callable[[Measurements], None],
) -> Measurements:
    """Time all trials of all cases; what one case set up is freed before the next.

    After each case `on_case` is called with all that was measured so far. A case that raises an error is left there,
    and the others are measured. The rooflines are measured before and, where nothing failed (else the device may be
    lost), after, and for each working set when it first occurs.
    """
    rooflines.measure()
    found = Measurements()
    rows = bench.options.rows
    on_progress(0, len(cases) * len(rows))
    for index, case in enumerate(cases):
        gc.collect()  # for what becomes a CUDA graph: its capture does not
        of_case: list[TimedTrial] = []
        try:
            for trial in _time_case(bench, case, rooflines):
                of_case.append(trial)
                on_progress(index * len(rows) + len(of_case), len(cases) * len(rows))
        except Exception as error:  # whatever it is, the other cases are worth having
            at = rows[min(len(of_case), len(rows) - 1)]  # or after the last, where something is let go of
            text = f"{type(error).__name__}: {error}"
            found.failures.append(Failure(case.op, case.variant, at, text, traceback.format_exc()))
        found.trials += of_case
        on_case(found)
    if not found.failures:
        rooflines.measure()
    return found


def _time_case(bench: Workbench, case: Case, rooflines: Rooflines) -> Iterator[TimedTrial]:
    """Its trials one by one; with the last of them, or an error, nothing holds on to what they were set up with."""
    for trial in case.trials(bench):
        rooflines.meet(trial.working_set)
        timings = timing.time_interleaved(trial.contenders, trial.steps, bench.options.repeats, *how_to_time(bench))
        yield TimedTrial(trial.op, trial.variant, trial.rows, trial.work, trial.working_set, timings)


def how_to_time(bench: Workbench) -> tuple[Clock, MakeBurst]:
    """With which clock, and how calls are put together."""
    if bench.device.type == "cuda":
        return cuda_timing.event_clock, cuda_timing.make_burst
    return timing.wall_clock, timing.make_burst
