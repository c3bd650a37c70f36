from collections import Counter

import numpy as np
import pytest

from onebase_server.bench.load import Load
from onebase_server.bench.prompts import TokenIdPrompts
from onebase_server.bench.traffic import WARM_UP_OUTPUT_TOKENS, adapter_numbers, arrival_seconds, plan_run, plan_warm_up

PROMPTS = TokenIdPrompts.of_vocabulary(32000)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("arrivals", "burstiness"), [("poisson", 1.0), ("gamma", 1.0), ("gamma", 0.25), ("gamma", 4.0)]
)
def test_arrivals_have_the_rate_and_the_variation_asked_for(arrivals: str, burstiness: float) -> None:
    load = Load.model_validate({"rate": 5, "arrivals": arrivals, "burstiness": burstiness, "requests": 20000})
    gaps = np.diff(arrival_seconds(load, rng()), prepend=0)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_in_a_closed_loop_nothing_waits_for_the_clock() -> None:
    assert arrival_seconds(Load(requests=3), rng()).tolist() == [0, 0, 0]


def test_popularities_without_chance() -> None:
    expected = {"none": [None] * 5, "same": [0] * 5, "distinct": [0, 1, 2, 0, 1]}
    for popularity, numbers in expected.items():
        load = Load.model_validate({"popularity": popularity, "requests": 5, "adapters": 3})
        assert adapter_numbers(load, rng()) == numbers


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
def test_zipf_asks_for_adapter_k_in_proportion_to_its_power(alpha: float) -> None:
    load = Load(popularity="zipf", zipf_alpha=alpha, adapters=20, requests=100_000)
    counts = Counter(adapter_numbers(load, rng()))
    for k in (1, 2, 4):
        assert counts[0] / counts[k - 1] == pytest.approx(k**alpha, rel=0.1)
    assert set(counts) == set(range(20))


def test_the_same_seed_plans_the_same_run() -> None:
    load = Load(rate=3, popularity="zipf", requests=20)
    assert plan_run(load, PROMPTS, 1) == plan_run(load, PROMPTS, 1)
    assert plan_run(load, PROMPTS, 1) != plan_run(load.model_copy(update={"seed": 1}), PROMPTS, 1)


def test_another_popularity_leaves_times_and_prompts_as_they_were() -> None:
    plans = [
        plan_run(Load.model_validate({"rate": 3, "popularity": name}), PROMPTS, 1) for name in ("none", "zipf", "same")
    ]
    assert len({tuple((planned.at_seconds, *planned.prompt) for planned in plan) for plan in plans}) == 1


def test_no_two_prompts_are_alike_beyond_the_shared_prefix() -> None:
    load = Load(requests=30, prompt_tokens=12, shared_prefix=4)
    prompts = [planned.prompt for run in (1, 2) for planned in plan_run(load, PROMPTS, run)]
    assert {len(prompt) for prompt in prompts} == {12}
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 1
    assert len({tuple(prompt[4:8]) for prompt in prompts}) == 60


def test_warm_up_is_short_and_shares_no_prompt_with_a_run() -> None:
    load = Load(warm_up=3, requests=8, output_tokens=100)
    warm_up = plan_warm_up(load, PROMPTS)
    assert [planned.output_tokens for planned in warm_up] == [WARM_UP_OUTPUT_TOKENS] * 3
    assert not {tuple(p.prompt) for p in warm_up} & {tuple(p.prompt) for p in plan_run(load, PROMPTS, 1)}
