"""The screen of a head: what it says of a logit is never further off than it admits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_kernels.cpu import head_screen

INPUTS = 64


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 30.0, 3000.0]))
def test_no_logit_is_further_from_its_codes_than_the_error_allows(seed: int, outlier: float) -> None:
    torch.manual_seed(seed)
    head, hidden = torch.randn(32, INPUTS), torch.randn(100, INPUTS).double()
    head[:, seed % INPUTS] *= outlier
    hidden[:, seed % INPUTS] *= outlier
    head = head.bfloat16()
    screen = head_screen.pack(head)
    codes = screen.codes.transpose(1, 2).reshape(32, INPUTS)
    rounded = (codes.double() - 128) * screen.scales.unsqueeze(1)
    off = (hidden @ (head.double() - rounded).T).abs()
    assert (off <= hidden.norm(dim=1, keepdim=True) * screen.errors).all()


def test_it_takes_little_more_than_half_of_the_head() -> None:
    head = torch.randn(4096, 512).bfloat16()
    screen = head_screen.pack(head)
    assert screen is not None
    assert screen.nbytes < 0.52 * head.nbytes


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_head_that_is_not_finite_has_none(value: float) -> None:
    head = torch.randn(64, 64).bfloat16()
    head[40, 3] = value
    assert head_screen.pack(head) is None


@pytest.mark.parametrize(
    "head",
    [
        torch.zeros(40, 64, dtype=torch.bfloat16),
        torch.zeros(48, 96, dtype=torch.bfloat16),
        torch.zeros(48, 64),
        torch.zeros(16, 1 << 16, dtype=torch.bfloat16),
    ],
    ids=["tokens", "inputs", "dtype", "sums would overflow"],
)
def test_heads_that_the_kernel_does_not_carry_have_none(head: torch.Tensor) -> None:
    assert not head_screen.can_pack(head)
