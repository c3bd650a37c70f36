"""How the fused NF4 product is best cut on this GPU: every plan that could be good is timed, and the fastest kept.

What is found goes to a plan file, which `onebase_kernels.triton.plans` describes; nothing is tuned while serving.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from rich.table import Table
from torch import Tensor
from triton import TritonError

from onebase_kernels.triton.nf4_linear import fused_linear
from onebase_kernels.triton.nf4_packing import FragmentNf4
from onebase_kernels.triton.plans import Plan, block_m_of, candidate_plans, plan_for, processors_of
from onebase_server.bench.kernels import timing
from onebase_server.bench.kernels.contenders import regardless_of_step
from onebase_server.bench.kernels.linear_cases import nf4_copies
from onebase_server.bench.kernels.measure import how_to_time
from onebase_server.bench.kernels.timing import Timing
from onebase_server.bench.kernels.trial import Contender
from onebase_server.bench.kernels.workbench import Workbench
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ProjectionGroup
from onebase_server.progress import OnProgress

SIEVE_REPEATS = 2
"""Measurements of each plan by which the finalists are chosen."""
FINALISTS = 5
"""Of a shape, which are measured as often as was asked for; beside them the plan that would have been taken."""


@dataclass(frozen=True)
class TunedPlan:
    """The fastest plan for x [block_m, k] and weights [n, k]; times are seconds per call."""

    n: int
    k: int
    plan: Plan
    seconds: float
    seconds_before: float | None
    """With the plan that would have been taken without this measurement; None if that cannot be launched."""


@torch.inference_mode()
def tune(bench: Workbench, on_progress: OnProgress) -> Iterator[TunedPlan]:
    """Measure the projection groups one by one, for the tiles that hold each of the workbench's rows.

    Raises:
        ConfigurationError: a product cannot be launched, however it is cut.
    """
    tiles = sorted({block_m_of(rows) for rows in bench.options.rows})
    groups = bench.config.distinct_groups
    for index, group in enumerate(groups):
        on_progress(index, len(groups))
        gc.collect()  # for what becomes a CUDA graph: its capture does not
        copies = nf4_copies(bench, ("triton",), group.widths, group.in_features).packed["triton"]
        weights = [packed for packed in copies if isinstance(packed, FragmentNf4)]  # all, or none if it has odd shapes
        if weights:
            yield from (_tune(bench, group, weights, block_m) for block_m in tiles)
    on_progress(len(groups), len(groups))


def _tune(bench: Workbench, group: ProjectionGroup, weights: Sequence[FragmentNf4], block_m: int) -> TunedPlan:
    """Measure all plans a few times, and then the fastest of them as often as was asked for."""
    n, k = sum(group.widths), group.in_features
    x = bench.random(block_m, k)
    before = plan_for(block_m, n, k, bench.device)
    plans = dict.fromkeys([before, *candidate_plans(block_m, n, k, processors_of(bench.device))])
    launchable = [plan for plan in plans if _can_be_launched(x, weights[0], plan)]
    if not launchable:
        raise ConfigurationError(
            f"No cut of the product of {block_m} rows and weights [{n}, {k}] can be launched here."
        )
    sieved = _time(bench, x, weights, launchable, min(SIEVE_REPEATS, bench.options.repeats))
    finalists = sorted(launchable, key=lambda plan: sieved[plan].lowest)[:FINALISTS]
    if before in launchable:
        finalists.append(before)
    timings = _time(bench, x, weights, finalists, bench.options.repeats)
    best = min(timings, key=lambda plan: timings[plan].median)
    return TunedPlan(n, k, best, timings[best].median, timings[before].median if before in timings else None)


def _can_be_launched(x: Tensor, weights: FragmentNf4, plan: Plan) -> bool:
    """Whether it compiles, and takes no more registers and shared memory than there are; it is compiled here."""
    try:
        fused_linear(x, weights, None, plan)
    except (RuntimeError, TritonError):
        return False
    return True


def _time(
    bench: Workbench, x: Tensor, weights: Sequence[FragmentNf4], plans: Sequence[Plan], repeats: int
) -> dict[Plan, Timing]:
    contenders = {
        plan: Contender(str(plan), [regardless_of_step(fused_linear, x, packed, None, plan) for packed in weights])
        for plan in plans
    }
    timings = timing.time_interleaved(list(contenders.values()), [bench.step(len(x))], repeats, *how_to_time(bench))
    return {plan: timings[contender.name] for plan, contender in contenders.items()}


def plan_file(bench: Workbench, tuned: Sequence[TunedPlan]) -> dict[str, Any]:
    """What to write, for this GPU and this version of Triton."""
    is_gpu = bench.device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(bench.device) if is_gpu else bench.device.type,
        "triton": ".".join(triton.__version__.split(".")[:2]),
        "plans": [{"n": one.n, "k": one.k, **asdict(one.plan)} for one in tuned],
    }


def tuning_table(tuned: Sequence[TunedPlan]) -> Table:
    """A line for each shape."""
    table = Table(title="The fused NF4 product, best cut", title_justify="left")
    for heading in ("outputs", "inputs", "rows", "outputs of a tile", "splits", "unroll", "warps", "µs", "before"):
        table.add_column(heading, justify="right")
    for one in tuned:
        plan = one.plan
        numbers = (one.n, one.k, plan.block_m, plan.block_n, plan.splits, plan.unroll, plan.num_warps)
        before = "-" if one.seconds_before is None else f"{1e6 * one.seconds_before:,.1f}"
        table.add_row(*map(str, numbers), f"{1e6 * one.seconds:,.1f}", before)
    return table
