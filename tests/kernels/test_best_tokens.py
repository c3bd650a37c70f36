"""The best tokens: with a screen or without one, those of the largest logits, and of equals the first."""

import pytest
import torch
from torch import Tensor

import onebase_kernels as kernels

INPUTS = 128


def make_head(vocab: int = 400) -> Tensor:
    return torch.randn(vocab, INPUTS).bfloat16()


def best_of(hidden: Tensor, head: Tensor) -> Tensor:
    return kernels.best_tokens(hidden, head, kernels.pack_screen(head))


def best_by_logits(hidden: Tensor, head: Tensor) -> Tensor:
    return kernels.head_logits(hidden, head).argmax(dim=-1)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 48, 49, 130])
def test_they_are_those_of_the_largest_logits(backend: str, rows: int) -> None:
    head, hidden = make_head(), torch.randn(rows, INPUTS).bfloat16()
    assert best_of(hidden, head).tolist() == best_by_logits(hidden, head).tolist()


@pytest.mark.parametrize(("vocab", "inputs"), [(401, 128), (400, 96)])
def test_a_head_of_any_size_has_them(backend: str, vocab: int, inputs: int) -> None:
    head, hidden = torch.randn(vocab, inputs).bfloat16(), torch.randn(5, inputs).bfloat16()
    assert best_of(hidden, head).tolist() == best_by_logits(hidden, head).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_have_them(backend: str, dtype: torch.dtype) -> None:
    head, hidden = make_head().to(dtype), torch.randn(5, INPUTS, dtype=dtype)
    assert best_of(hidden, head).tolist() == best_by_logits(hidden, head).tolist()


def test_of_equals_the_first_is_taken(backend: str) -> None:
    head, hidden = make_head(), torch.randn(3, INPUTS).bfloat16()
    head[[70, 77, 333]] = hidden[0] * 4  # in one block and in another
    head[[5, 399]] = hidden[1] * 4
    assert best_of(hidden, head).tolist()[:2] == [70, 5]


def test_tokens_that_differ_by_less_than_the_screen_can_tell_are_told_apart(backend: str) -> None:
    hidden = torch.randn(20, INPUTS).bfloat16()
    nearly = hidden[:1] + 0.01 * torch.randn(400, INPUTS)  # all tokens nearly as good for the first row
    head = nearly.bfloat16()
    assert best_of(hidden, head).tolist() == best_by_logits(hidden, head).tolist()


@pytest.mark.parametrize("inputs", [128, 4096])
def test_what_the_screen_loses_of_hidden_states_changes_nothing(backend: str, inputs: int) -> None:
    """All but one number of each are a few of the steps that 16 bits have, and eight bits hold the head as it is."""
    hidden = torch.rand(20, inputs).bfloat16() * 3 / 0x7F7F
    head = torch.randint(-127, 128, (400, inputs)).bfloat16()
    hidden[:, 0], head[:, 0] = 1, 127
    assert best_of(hidden, head).tolist() == best_by_logits(hidden, head).tolist()


@pytest.mark.parametrize("kind", ["one large input", "one large weight", "rows of unlike length", "tiny", "huge"])
def test_numbers_that_eight_bits_hold_badly_change_nothing(backend: str, kind: str) -> None:
    head, hidden = make_head(), torch.randn(40, INPUTS).bfloat16()
    match kind:
        case "one large input":
            hidden[:, 3] *= 1000
        case "one large weight":
            head[:, 3] *= 1000
        case "rows of unlike length":
            head *= torch.logspace(-4, 4, len(head)).bfloat16().unsqueeze(1)
        case "tiny":
            hidden *= 1e-15
        case "huge":
            hidden *= 1e15
    assert best_of(hidden, head).tolist() == best_by_logits(hidden, head).tolist()


def test_zeros_choose_the_first_token(backend: str) -> None:
    head = make_head()
    assert best_of(torch.zeros(2, INPUTS).bfloat16(), head).tolist() == [0, 0]
    assert best_of(torch.ones(2, INPUTS).bfloat16(), torch.zeros_like(head)).tolist() == [0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_leaves_the_others_alone(backend: str, value: float) -> None:
    head, hidden = make_head(), torch.randn(20, INPUTS).bfloat16()
    hidden[7] = value
    others = torch.arange(20) != 7
    chosen = best_of(hidden, head)
    assert chosen[others].tolist() == best_by_logits(hidden, head)[others].tolist()
    assert 0 <= chosen[7] < len(head)


def test_a_row_alone_has_the_token_it_has_beside_others(backend: str) -> None:
    head, hidden = make_head(), torch.randn(40, INPUTS).bfloat16()
    together = best_of(hidden, head).tolist()
    assert [best_of(row.unsqueeze(0), head).item() for row in hidden] == together
