"""Choosing tokens: every back end draws from the same set with the same probabilities."""

import pytest
import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import SamplingBatch, reference

LIMITS = [
    {"temperature": 0.0},
    {},
    {"top_k": 3},
    {"top_k": 5000},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 50.0, "top_p": 0.999},  # more tokens survive than are sorted at first
]


def batch(rows: int, limits: dict[str, float], uniform: Tensor) -> SamplingBatch:
    def each(name: str, default: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), limits.get(name, default), dtype=dtype)

    return SamplingBatch(
        each("temperature", 0.8), each("top_k", 0, torch.int64), each("top_p", 1.0), each("min_p", 0), uniform
    )


@pytest.mark.parametrize("vocab", [1000, 1003, 7])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_every_back_end_chooses_as_the_reference(backend: str, limits: dict[str, float], vocab: int) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(200, vocab)
    sampling = batch(200, limits, torch.rand(200, dtype=torch.float64))
    chosen, expected = kernels.choose_tokens(logits, sampling), reference.choose_tokens(logits, sampling)
    # Sums in another order may move a boundary between two tokens past a random number, once in a great while.
    assert (chosen != expected).sum() <= 1


def test_equals_are_kept_in_the_order_of_the_vocabulary(backend: str) -> None:
    logits = torch.zeros(50, 100)
    uniform = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    assert set(kernels.choose_tokens(logits, batch(50, {"top_k": 4}, uniform)).tolist()) == {0, 1, 2, 3}
    assert kernels.choose_tokens(logits, batch(50, {"temperature": 0.0}, uniform)).tolist() == [0] * 50


def test_tokens_that_are_ruled_out_are_never_chosen(backend: str) -> None:
    logits = torch.full((20, 30), -torch.inf)
    logits[:, [4, 9]] = torch.tensor([1.0, 1.0])
    uniform = torch.linspace(0, 0.999, 20, dtype=torch.float64)
    for limits in LIMITS:
        assert set(kernels.choose_tokens(logits, batch(20, limits, uniform)).tolist()) <= {4, 9}
