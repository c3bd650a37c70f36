"""Plans: what a file may say, which one is taken, and what is done where there is none."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from onebase_kernels.triton.plans import InvalidPlan, Plan, block_m_of, candidate_plans, default_plan, read_plans

GPU, TRITON = "NVIDIA H200", "3.6.0"
PLAN = Plan(block_m=16, block_n=128, splits=4, unroll=2, num_warps=4)


def write(path: Path, **changes: Any) -> Path:
    entry = {"n": 4096, "k": 4096, **asdict(PLAN)} | changes
    entry = {key: value for key, value in entry.items() if value is not None}
    path.write_text(json.dumps({"gpu": GPU, "triton": "3.6", "plans": [entry]}))
    return path


def test_a_plan_is_found_by_its_shape_and_rows(tmp_path: Path) -> None:
    assert read_plans(write(tmp_path / "plans.json"), GPU, TRITON) == {(4096, 4096, 16): PLAN}


@pytest.mark.parametrize(("gpu", "version"), [("NVIDIA H100", TRITON), (GPU, "3.7.1"), (GPU, "3.60.0")])
def test_plans_of_another_gpu_or_version_are_left_alone(tmp_path: Path, gpu: str, version: str) -> None:
    assert read_plans(write(tmp_path / "plans.json"), gpu, version) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_m": 8}, "block_m is 8; it must be one of"),
        ({"num_warps": 2}, "num_warps is 2; it must be one of"),
        ({"n": 4160}, "block_n is 128, which does not divide n = 4160"),
        ({"block_n": 64, "num_warps": 8}, "8 warps need block_n of 128, not 64"),
        ({"splits": 3}, "their product must divide the 64 blocks"),
        ({"splits": 0}, "positive whole numbers"),
        ({"unroll": "2"}, "positive whole numbers"),
        ({"splits": None}, "the keys must be n, k, block_m"),
        ({"stages": 3}, "the keys must be n, k, block_m"),
    ],
)
def test_an_impossible_plan_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidPlan, match=message) as error:
        read_plans(write(tmp_path / "plans.json", **changes), GPU, TRITON)
    assert "plans.json, plans[0]" in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"gpu": "NVIDIA H200", "triton": 3.6, "plans": []}'])
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "plans.json").write_text(content)
    with pytest.raises(InvalidPlan, match=r"plans\.json is no plan file"):
        read_plans(tmp_path / "plans.json", GPU, TRITON)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 200, 256])
@pytest.mark.parametrize(
    ("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (960, 576), (64, 64), (1152, 896)]
)
def test_the_rule_of_thumb_fits_every_shape(rows: int, n: int, k: int) -> None:
    plan = default_plan(rows, n, k, processors=132)
    plan.check(n, k)
    assert plan.block_m == block_m_of(rows)


@pytest.mark.parametrize("rows", [1, 20, 64, 256])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_the_plans_to_measure_are_few_and_the_rule_of_thumb_is_among_them(rows: int, n: int, k: int) -> None:
    candidates = list(candidate_plans(rows, n, k, processors=132))
    for plan in candidates:
        plan.check(n, k)
    assert default_plan(rows, n, k, processors=132) in candidates
    assert len(set(candidates)) == len(candidates) < 60


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_the_rule_of_thumb_gives_every_processor_a_program_and_more(n: int, k: int) -> None:
    plan = default_plan(1, n, k, processors=132)
    assert n // plan.block_n * plan.splits >= 1.5 * 132
