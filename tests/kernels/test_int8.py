"""Row-wise int8 against bitsandbytes, bit for bit."""

import pytest
import torch
from bitsandbytes import functional as bnb

from onebase_kernels import dequantize, quantize_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_bitsandbytes(dtype: torch.dtype) -> None:
    weight = torch.randn(48, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = quantize_int8(weight)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert torch.equal(dequantize(ours, torch.float32), bnb.int8_vectorwise_dequant(codes, absmax))


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 0.5
    assert torch.equal(dequantize(quantize_int8(weight), torch.float32), weight)


def test_a_weight_takes_eight_bits_and_four_bytes_for_each_row() -> None:
    assert quantize_int8(torch.randn(16, 96)).nbytes == 16 * 96 + 16 * 4


def test_a_weight_keeps_its_numbers_when_it_moves() -> None:
    weight = quantize_int8(torch.randn(7, 100))
    moved = weight.to(torch.device("cpu"))
    assert torch.equal(dequantize(moved, torch.float32), dequantize(weight, torch.float32))
