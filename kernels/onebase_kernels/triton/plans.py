"""How the fused NF4 product is cut into programs: measured plans where there are some, a rule of thumb elsewhere.

A plan file, `plans/<name>.json`, holds what was measured on one GPU with one version of Triton:

    {"gpu": "NVIDIA H200", "triton": "3.6", "plans": [{"n": 6144, "k": 4096, "block_m": 16, "block_n": 128, ...}]}

Everything is chosen before the first request; nothing is tuned while serving.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path

import torch
import triton

from onebase_kernels.blockwise import BLOCK_SIZE

MAX_FUSED_ROWS = 256
"""Rows of x beyond which dequantising the weights once costs less than decoding them for every tile of rows."""

PLAN_FOLDER = Path(__file__).parent / "plans"
"""Where plan files lie."""

_BLOCK_M = (16, 32, 64, 128)
_BLOCK_N = (64, 128)
_WARPS = (4, 8)
_UNROLL = (1, 2, 4)
_MIN_BLOCKS = 4  # of a split
_MOST_PROGRAMS = 8  # for a processor, of a plan that is measured
_INTERPRETER_PROCESSORS = 4


class InvalidPlan(ValueError):
    """A plan file says something that the kernel cannot do."""


@dataclass(frozen=True)
class Plan:
    """The constants that a product x [M, K] · Wᵀ [K, N] is compiled with."""

    block_m: int
    """Rows of x in a program's tile."""
    block_n: int
    """Outputs in a program's tile."""
    splits: int
    """Programs that share out the inputs of a tile; each writes a plane of partial sums if there are several."""
    unroll: int
    """Blocks of 64 inputs whose codes are loaded together, while as many before them are multiplied."""
    num_warps: int
    """Warps of a program."""

    def check(self, n: int, k: int) -> None:
        """Raise InvalidPlan if weights [n, k] cannot be cut like that."""
        blocks = k // BLOCK_SIZE
        for name, allowed in (
            *(("block_m", _BLOCK_M), ("block_n", _BLOCK_N)),
            *(("num_warps", _WARPS), ("unroll", _UNROLL)),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidPlan(f"{name} is {getattr(self, name)}; it must be one of {allowed}.")
        if n % self.block_n:
            raise InvalidPlan(f"block_n is {self.block_n}, which does not divide n = {n}.")
        if self.block_n < 16 * self.num_warps:
            raise InvalidPlan(f"{self.num_warps} warps need block_n of {16 * self.num_warps}, not {self.block_n}.")
        if self.splits < 1 or blocks % (self.splits * self.unroll):
            raise InvalidPlan(
                f"splits and unroll are {self.splits} and {self.unroll}; their product must divide the {blocks} blocks "
                f"of 64 inputs."
            )


PlanTable = Mapping[tuple[int, int, int], Plan]
"""Plans by (n, k, block_m)."""


def block_m_of(rows: int) -> int:
    """The smallest tile that holds so many rows, or the largest there is."""
    return next((size for size in _BLOCK_M if rows <= size), _BLOCK_M[-1])


@cache
def plan_for(rows: int, n: int, k: int, device: torch.device) -> Plan:
    """The plan for x [rows, k] and weights [n, k]: measured on this GPU, or the rule of thumb."""
    measured = measured_plans(device).get((n, k, block_m_of(rows)))
    return measured or default_plan(rows, n, k, processors_of(device))


def default_plan(rows: int, n: int, k: int, processors: int) -> Plan:
    """Three programs for every two of the GPU's processors at least, if the inputs can be shared out like that.

    Wide tiles take the fewest instructions a code. More splits would mean more partial sums to write and read.
    """
    block_m = block_m_of(rows)
    blocks = k // BLOCK_SIZE
    block_n = 128 if n % 128 == 0 else 64
    tiles = n // block_n * -(-rows // block_m)
    candidates = [count for count in range(1, blocks + 1) if blocks % count == 0 and blocks // count >= _MIN_BLOCKS]
    splits = next(
        (count for count in candidates if 2 * tiles * count >= 3 * processors), candidates[-1] if candidates else 1
    )
    # Sums of many rows, and more codes in flight, would take more registers than a thread has.
    unroll = next(count for count in ((4, 2, 1) if block_m == 16 else (2, 1)) if blocks // splits % count == 0)
    return Plan(block_m, block_n, splits, unroll, num_warps=8 if block_n == 128 and block_m >= 64 else 4)


def candidate_plans(rows: int, n: int, k: int, processors: int) -> Iterator[Plan]:
    """The plans that are worth measuring: they give the GPU's processors a program each at least, eight at most."""
    blocks = k // BLOCK_SIZE
    tiles_m = -(-rows // block_m_of(rows))
    for block_n, num_warps, splits, unroll in product(_BLOCK_N, _WARPS, range(1, blocks + 1), _UNROLL):
        plan = Plan(block_m_of(rows), block_n, splits, unroll, num_warps)
        try:
            plan.check(n, k)
        except InvalidPlan:
            continue
        if processors <= n // block_n * tiles_m * splits <= _MOST_PROGRAMS * processors:
            yield plan


@cache
def measured_plans(device: torch.device) -> PlanTable:
    """The plans of the files for this GPU and this version of Triton."""
    if device.type != "cuda":
        return {}
    gpu, version = torch.cuda.get_device_name(device), triton.__version__
    tables = [read_plans(path, gpu, version) for path in sorted(PLAN_FOLDER.glob("*.json"))]
    return {key: plan for table in tables for key, plan in table.items()}


def read_plans(path: Path, gpu: str, triton_version: str) -> PlanTable:
    """A file's plans, none if they are for another GPU or another version of Triton.

    Raises InvalidPlan, naming the file and the entry, for anything that the kernel could not do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["gpu"] != gpu or not triton_version.startswith(content["triton"] + "."):
            return {}
        entries = list(content["plans"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidPlan(f"{path} is no plan file: it needs the keys gpu, triton and plans ({error!r}).") from error
    table = {}
    for number, entry in enumerate(entries):
        try:
            n, k, plan = _parse(entry)
            plan.check(n, k)
        except InvalidPlan as error:
            raise InvalidPlan(f"{path}, plans[{number}]: {error}") from None
        table[n, k, plan.block_m] = plan
    return table


def _parse(entry: object) -> tuple[int, int, Plan]:
    names = ["n", "k", *(field.name for field in fields(Plan))]
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise InvalidPlan(f"the keys must be {', '.join(names)}.")
    if not all(type(value) is int and value > 0 for value in entry.values()):
        raise InvalidPlan("all values must be positive whole numbers.")
    n, k, *rest = (entry[name] for name in names)
    return n, k, Plan(*rest)


def processors_of(device: torch.device) -> int:
    """How many streaming multiprocessors the GPU has."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
