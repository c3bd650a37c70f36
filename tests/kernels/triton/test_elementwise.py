"""What the tests of all back ends do not reach: half precisions of every op, a token that is written nowhere."""

import pytest
import torch

from onebase_kernels import AttentionBatch, reference
from onebase_kernels.triton import elementwise

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@DTYPES
def test_norms_round_where_the_reference_does(dtype: torch.dtype) -> None:
    hidden, delta, weight = (torch.randn(shape).to(dtype) for shape in ((3, 40), (3, 40), (40,)))
    torch.testing.assert_close(elementwise.rms_norm(hidden, weight, 1e-5), reference.rms_norm(hidden, weight, 1e-5))
    total = hidden.clone()
    expected = reference.add_rms_norm_(total, delta, weight, 1e-5)
    torch.testing.assert_close(elementwise.add_rms_norm_(hidden, delta, weight, 1e-5), expected)
    assert torch.equal(hidden, total)


@DTYPES
def test_activations_round_where_the_reference_does(dtype: torch.dtype) -> None:
    gate_up = 4 * torch.randn(2, 48).to(dtype)
    torch.testing.assert_close(elementwise.gelu_mul(gate_up), reference.gelu_mul(gate_up))
    torch.testing.assert_close(elementwise.silu_mul(gate_up), reference.silu_mul(gate_up))


@DTYPES
def test_rope_rounds_where_the_reference_does(dtype: torch.dtype) -> None:
    q, k, angles, positions = (
        torch.randn(2, 3, 20).to(dtype),
        torch.randn(2, 1, 20).to(dtype),
        torch.rand(9, 10),
        [8, 0],
    )
    expected_q, expected_k = q.clone(), k.clone()
    reference.apply_rope_(expected_q, expected_k, angles.cos(), angles.sin(), torch.tensor(positions))
    elementwise.apply_rope_(q, k, angles.cos(), angles.sin(), torch.tensor(positions))
    torch.testing.assert_close(q, expected_q)
    torch.testing.assert_close(k, expected_k)


def test_no_two_warps_hold_the_same_number() -> None:
    """Else one would read what another has already written in place."""
    for exponent in range(15):
        numbers = 1 << exponent
        warps = elementwise.warps_for(numbers)
        assert warps in (1, 2, 4, 8, 16)
        assert warps == 1 or 32 * warps <= numbers


def test_a_token_that_only_fills_the_step_up_is_written_nowhere() -> None:
    k, caches = torch.randn(3, 2, 6), [torch.zeros(2, 2, 2, 6) for _ in range(2)]
    batch = AttentionBatch((0, 3), (3,), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2, -1, 1]))
    elementwise.write_kv_(k, k, *caches, batch)
    for cache in caches:
        assert torch.equal(cache.view(4, 2, 6)[[2, 1]], k[[0, 2]])
        assert not cache.view(4, 2, 6)[[0, 3]].any()
