"""Group-wise int4: what is kept exactly, and how far the rest is from the weight."""

import pytest
import torch
from torch import Tensor

from onebase_kernels import Int4Weight, dequantize_int4, quantize_int4
from onebase_kernels.int4 import GROUP_SIZES


def random_weight(out_features: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(out_features)
    return torch.randn(out_features, in_features, generator=generator) * 0.02 + 0.01


def by_group(weight: Tensor, group_size: int) -> Tensor:
    return weight.reshape(weight.shape[0], -1, group_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_no_weight_is_further_from_itself_than_half_a_step(group_size: int, dtype: torch.dtype) -> None:
    weight = random_weight(48, 384).to(dtype)
    quantised = quantize_int4(weight, group_size)
    error = by_group(dequantize_int4(quantised, torch.float32) - weight.float(), group_size)
    steps = quantised.scales.float().unsqueeze(-1)
    assert bool((error.abs() <= 0.51 * steps).all())  # the scale itself is rounded to fp16


def test_the_least_weight_of_each_group_is_exact_and_the_largest_has_the_last_code() -> None:
    weight = random_weight(16, 128)
    quantised = quantize_int4(weight, 64)
    groups, found = by_group(weight, 64), by_group(dequantize_int4(quantised, torch.float32), 64)
    assert torch.equal(found.amin(dim=-1), groups.amin(dim=-1))
    codes = by_group(torch.stack((quantised.codes >> 4, quantised.codes & 15), dim=-1).view(weight.shape), 64)
    assert bool((codes.gather(-1, groups.argmax(dim=-1, keepdim=True)) == 15).all())


def test_the_first_of_two_codes_lies_in_the_high_half() -> None:
    weight = Int4Weight(
        codes=torch.full((1, 16), 0x1F, dtype=torch.uint8),
        scales=torch.tensor([[0.5]], dtype=torch.float16),
        minimums=torch.tensor([[-2.0]]),
        shape=(1, 32),
        group_size=32,
    )
    assert dequantize_int4(weight, torch.float32)[0, :4].tolist() == [-1.5, 5.5, -1.5, 5.5]


def test_what_int4_stands_for_quantises_to_itself() -> None:
    once = dequantize_int4(quantize_int4(random_weight(8, 256), 32), torch.float32)
    torch.testing.assert_close(dequantize_int4(quantize_int4(once, 32), torch.float32), once)


def test_a_group_of_equal_weights_is_exact() -> None:
    weight = torch.full((2, 64), 0.3)
    assert torch.equal(dequantize_int4(quantize_int4(weight, 32), torch.float32), weight)


def test_a_constant_added_to_a_group_changes_its_minimum_alone() -> None:
    weight = quantize_int4(random_weight(8, 128), 64)
    shifts = torch.randn(8, 2) * 0.01
    folded = Int4Weight(weight.codes, weight.scales, weight.minimums + shifts, weight.shape, weight.group_size)
    expected = dequantize_int4(weight, torch.float32) + shifts.repeat_interleave(64, dim=1)
    torch.testing.assert_close(dequantize_int4(folded, torch.float32), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("group_size", "bits"), [(32, 5.5), (64, 4.75), (128, 4.375)])
def test_bits_per_weight_are_the_codes_and_six_bytes_for_each_group(group_size: int, bits: float) -> None:
    assert 8 * quantize_int4(random_weight(16, 256), group_size).nbytes / (16 * 256) == bits


def test_more_weights_than_are_worked_on_at_a_time_are_quantised_alike() -> None:
    weight = random_weight(1100, 2048)
    whole, last = quantize_int4(weight, 64), quantize_int4(weight[-3:], 64)
    assert torch.equal(whole.codes[-3:], last.codes)
    assert torch.equal(dequantize_int4(whole, torch.bfloat16)[-3:], dequantize_int4(last, torch.bfloat16))


def test_inputs_that_are_no_multiple_of_the_group_size_are_refused() -> None:
    with pytest.raises(ValueError, match="96 inputs are no multiple of the group size 64"):
        quantize_int4(random_weight(4, 96), 64)


def test_a_weight_keeps_its_numbers_when_it_moves() -> None:
    weight = quantize_int4(random_weight(4, 64), 32)
    moved = weight.to(torch.device("cpu"))
    assert torch.equal(dequantize_int4(moved, torch.float32), dequantize_int4(weight, torch.float32))
