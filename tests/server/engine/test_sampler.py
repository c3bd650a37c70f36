"""Sampling: each row alone decides its token, and the parameters mean what they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_server.engine.request import SamplingParams
from onebase_server.engine.sampler import apply_penalties_, chosen_logprobs, sample, uniform_number
from onebase_server.engine.sequence import Sequence

VOCAB = 50


def make_sequence(prompt: tuple[int, ...] = (1, 2), answer: tuple[int, ...] = (), **params: object) -> Sequence:
    sampling = SamplingParams(max_tokens=8, **params)  # type: ignore[arg-type]  # names are checked by msgspec
    return Sequence(
        request_id="r",
        token_ids=[*prompt, *answer],
        num_prompt_tokens=len(prompt),
        sampling=sampling,
        seed=sampling.seed or 0,
        adapter=None,
        arrival=0.0,
    )


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(logits: torch.Tensor, count: int, **params: object) -> list[int]:
    """Tokens that `count` different seeds choose from one row of logits."""
    sequences = [make_sequence(seed=seed, **params) for seed in range(count)]
    return sample(logits.repeat(count, 1), sequences)


def test_temperature_zero_takes_the_best() -> None:
    logits = random_logits(4)
    best = logits.argmax(-1).tolist()
    assert sample(logits, [make_sequence(temperature=0.0) for _ in range(4)]) == best


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_a_temperature_too_small_to_divide_by_takes_the_best(temperature: float) -> None:
    logits = random_logits(1)
    assert set(draw(logits, 20, temperature=temperature)) == {int(logits.argmax())}


def test_a_top_k_beyond_the_vocabulary_is_all_of_it() -> None:
    logits = random_logits(1)
    assert draw(logits, 50, top_k=2**63 - 1) == draw(logits, 50, top_k=VOCAB)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["greedy", "plain", "top_k", "top_p", "min_p", "penalised"]), min_size=2, max_size=6))
def test_a_row_does_not_depend_on_the_rows_beside_it(kinds: list[str]) -> None:
    params: dict[str, dict[str, object]] = {
        "greedy": {"temperature": 0.0},
        "plain": {"temperature": 1.3},
        "top_k": {"top_k": 5},
        "top_p": {"top_p": 0.7},
        "min_p": {"min_p": 0.1},
        "penalised": {"repetition_penalty": 1.5, "presence_penalty": 0.5},
    }
    sequences = [make_sequence(seed=number, **params[kind]) for number, kind in enumerate(kinds)]
    logits = random_logits(len(kinds), seed=7)
    together = sample(logits.clone(), sequences)
    alone = [sample(logits[i : i + 1].clone(), [sequence])[0] for i, sequence in enumerate(sequences)]
    assert together == alone


def test_the_same_seed_and_position_choose_the_same_token_and_others_differ() -> None:
    assert uniform_number(5, 10) == uniform_number(5, 10)
    assert len({uniform_number(seed, position) for seed in range(30) for position in range(30)}) == 900


@pytest.mark.parametrize("params", [{}, {"top_k": VOCAB}], ids=["unfiltered", "filtered path"])
def test_tokens_come_with_the_frequency_of_their_probability(params: dict[str, object]) -> None:
    logits = random_logits(1)
    count = 4000
    observed = torch.bincount(torch.tensor(draw(logits[0], count, temperature=0.8, **params)), minlength=VOCAB) / count
    expected = torch.softmax(logits[0] / 0.8, dim=-1)
    assert (observed - expected).abs().max() < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 1e9])
def test_top_k_of_one_takes_the_best_at_any_temperature(temperature: float) -> None:
    logits = random_logits(1)
    assert set(draw(logits, 20, top_k=1, temperature=temperature)) == {int(logits.argmax())}


def test_top_k_keeps_the_k_best() -> None:
    logits = random_logits(1)[0]
    assert set(draw(logits, 300, top_k=3, temperature=5.0)) == set(logits.topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert set(draw(logits, 300, top_p=0.8)) == {0, 1}
    assert set(draw(logits, 300, top_p=0.81)) == {0, 1, 2}
    assert set(draw(logits, 50, top_p=1e-9)) == {0}


def test_min_p_keeps_what_reaches_a_share_of_the_best() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert set(draw(logits, 300, min_p=0.29)) == {0, 1, 2}


def test_top_p_counts_within_what_top_k_left() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert set(draw(logits, 300, top_k=2, top_p=0.5)) == {0}


def test_repetition_penalty_weakens_what_was_seen_in_prompt_or_answer() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, 2.0])
    apply_penalties_(logits, make_sequence(prompt=(0, 1), answer=(2,), repetition_penalty=2.0))
    assert logits.tolist() == [1.0, -4.0, 1.0, 2.0]


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    logits = torch.zeros(4)
    apply_penalties_(logits, make_sequence(prompt=(0,), answer=(1, 2, 2), presence_penalty=0.5, frequency_penalty=0.25))
    assert logits.tolist() == [0.0, -0.75, -1.0, 0.0]


def test_logprobs_report_the_chosen_token_and_the_best_beside_it() -> None:
    logits = random_logits(2)
    reports = chosen_logprobs(logits, [3, 4], 2)
    expected = torch.log_softmax(logits, dim=-1)
    assert [report.logprob for report in reports] == pytest.approx([expected[0, 3].item(), expected[1, 4].item()])
    assert [token for token, _ in reports[0].top] == expected[0].topk(2).indices.tolist()
