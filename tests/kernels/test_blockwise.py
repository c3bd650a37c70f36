"""NF4 and FP4 against bitsandbytes, bit for bit."""

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from onebase_kernels import BlockwiseWeight, dequantize, quantize_fp4, quantize_nf4
from onebase_kernels.blockwise import dynamic_map

# whole blocks, blocks across rows, ragged last block, odd count, less than a block, nested blocks, more than one chunk
SHAPES = [(64, 128), (6, 160), (3, 100), (7, 9), (1, 5), (300, 128), (1500, 1600)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[0, :5] = 0.0
    return weight.to(dtype)


QUANTISE = {"nf4": quantize_nf4, "fp4": quantize_fp4}


def quantize_with_bitsandbytes(weight: Tensor, double_quant: bool, kind: str = "nf4") -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=double_quant)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", QUANTISE)
def test_codes_and_scales_are_bitsandbytes(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    weight = random_weight(shape, dtype)
    ours = QUANTISE[kind](weight, double_quant)
    codes, state = quantize_with_bitsandbytes(weight, double_quant, kind)
    assert torch.equal(torch.tensor(ours.codebook.values), state.code)
    assert ours.shape == shape
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    if double_quant:
        assert ours.nested is not None
        assert torch.equal(ours.nested.absmax, state.state2.absmax)
        assert torch.equal(ours.nested.offset, state.offset)
        assert torch.equal(ours.nested.quant_map, state.state2.code)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", QUANTISE)
def test_dequantised_weight_is_bitsandbytes(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    weight = random_weight(shape, dtype)
    codes, state = quantize_with_bitsandbytes(weight, double_quant, kind)
    # As one long row: bitsandbytes' AVX-512 code takes a wrong scale where a block goes on in the next row.
    state.shape = torch.Size([1, weight.numel()])
    expected = bnb.dequantize_4bit(codes, state).view(shape)
    assert torch.equal(dequantize(QUANTISE[kind](weight, double_quant), dtype), expected)


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    for double_quant in (False, True):
        assert torch.equal(dequantize(quantize_nf4(weight, double_quant), torch.float32), weight)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_far_from_one_survive(scale: float) -> None:
    weight = random_weight((32, 64), torch.float32) * scale
    codes, state = quantize_with_bitsandbytes(weight, double_quant=False)
    ours = quantize_nf4(weight, double_quant=False)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.absmax, state.absmax)


def test_the_8_bit_map_is_bitsandbytes() -> None:
    assert torch.equal(dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


def test_double_quantisation_takes_a_little_over_four_bits_a_weight() -> None:
    weight = quantize_nf4(random_weight((512, 1024), torch.bfloat16), double_quant=True)
    assert 8 * weight.nbytes / (512 * 1024) == pytest.approx(4.127, abs=0.001)


def test_a_weight_keeps_its_numbers_when_it_moves() -> None:
    weight = quantize_nf4(random_weight((7, 100), torch.bfloat16))
    moved: BlockwiseWeight = weight.to(torch.device("cpu"))
    assert torch.equal(dequantize(moved, torch.float32), dequantize(weight, torch.float32))
