"""The product in every way that a plan can cut it, and beyond the rows that are fused."""

import pytest
import torch
from torch import Tensor

from onebase_kernels import dequantize, quantize_nf4
from onebase_kernels.triton import backend, nf4_linear
from onebase_kernels.triton.nf4_packing import FragmentNf4, pack
from onebase_kernels.triton.plans import MAX_FUSED_ROWS, Plan

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PLANS = [
    Plan(block_m=16, block_n=64, splits=1, unroll=4, num_warps=4),
    Plan(block_m=16, block_n=128, splits=2, unroll=2, num_warps=8),
    Plan(block_m=32, block_n=128, splits=4, unroll=1, num_warps=4),
    Plan(block_m=64, block_n=64, splits=2, unroll=1, num_warps=4),
    Plan(block_m=128, block_n=128, splits=1, unroll=2, num_warps=8),
]
WIDTHS, IN_FEATURES = (128, 64, 64), 256


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def group(double_quant: bool, in_features: int = IN_FEATURES) -> tuple[FragmentNf4, Tensor]:
    """The weights of a group, packed and dequantised."""
    weights = [quantize_nf4(random(n, in_features, seed=i) * 0.02, double_quant) for i, n in enumerate(WIDTHS)]
    return pack(weights), torch.cat([dequantize(weight, torch.float32) for weight in weights])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.block_m}x{plan.block_n}, {plan.splits} splits")
def test_every_cut_gives_the_product(plan: Plan, dtype: torch.dtype, tolerance: float, double_quant: bool) -> None:
    packed, weights = group(double_quant)
    x, bias = random(plan.block_m + 3, IN_FEATURES, seed=8).to(dtype), random(sum(WIDTHS), seed=9).to(dtype)
    expected = x.float() @ weights.T
    assert relative_error(nf4_linear.fused_linear(x, packed, None, plan), expected) < tolerance
    assert relative_error(nf4_linear.fused_linear(x, packed, bias, plan), expected + bias) < tolerance


@pytest.mark.parametrize(
    ("rows", "dtype", "tolerance"),
    [
        (1, torch.bfloat16, 5e-3),
        (MAX_FUSED_ROWS + 1, torch.bfloat16, 5e-3),
        (1, torch.float32, 1e-6),
        (70, torch.float32, 1e-6),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_op_takes_any_number_of_rows_and_type(
    rows: int, dtype: torch.dtype, tolerance: float, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_linear, "_CHUNK_BYTES", 100_000)  # so that there are several chunks
    packed, weights = group(double_quant=True)
    x, bias = random(rows, IN_FEATURES, seed=8).to(dtype), random(sum(WIDTHS), seed=9).to(dtype)
    expected = x.float() @ weights.T + (bias if has_bias else 0)
    found = backend.quantized_linear(x, packed, bias if has_bias else None)
    assert found.dtype == dtype
    assert relative_error(found, expected) < tolerance


def test_odd_numbers_of_blocks_are_carried() -> None:
    packed, weights = group(double_quant=True, in_features=576)
    x = random(5, 576, seed=8).bfloat16()
    assert relative_error(backend.quantized_linear(x, packed), x.float() @ weights.T) < 5e-3


def test_no_rows_give_no_rows() -> None:
    packed, _ = group(double_quant=False)
    assert backend.quantized_linear(torch.empty(0, IN_FEATURES, dtype=torch.bfloat16), packed).shape == (0, sum(WIDTHS))


def test_rows_far_apart_in_memory_are_carried() -> None:
    packed, weights = group(double_quant=False)
    x = random(3, 2 * IN_FEATURES).bfloat16()[:, IN_FEATURES:]
    assert relative_error(backend.quantized_linear(x, packed), x.float() @ weights.T) < 5e-3


@pytest.mark.parametrize("magnitude", [1e-15, 1e15])
def test_inputs_far_from_one_survive(magnitude: float) -> None:
    packed, weights = group(double_quant=False)
    x = (random(2, IN_FEATURES) * magnitude).bfloat16()
    assert relative_error(backend.quantized_linear(x, packed), x.float() @ weights.T) < 5e-3


def test_an_nf4_head_gives_logits_in_fp32() -> None:
    packed, weights = group(double_quant=True)
    hidden = random(2, IN_FEATURES).bfloat16()
    logits = backend.head_logits(hidden, packed)
    assert logits.dtype == torch.float32
    assert relative_error(logits, hidden.float() @ weights.T) < 5e-3
