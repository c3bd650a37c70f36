"""The codebook and the instructions that decode it, in a model of the few instructions that they are."""

import re
from collections.abc import Sequence

import pytest
import torch

from onebase_kernels.blockwise import NF4
from onebase_kernels.triton.nf4_decode import CODEBOOKS, DECODE_ASM, RECODED, byte_tables, nf4_values, operands

DTYPES = pytest.mark.parametrize("dtype", CODEBOOKS, ids=str)
ALL_CODES = [0x76543210, 0xFEDCBA98, 0x13579BDF, 0x02468ACE]


def permute_bytes(low: int, high: int, selector: int) -> int:
    """PRMT: a byte of the eight for each nibble of the selector, or its sign, eight times, where the top bit is set."""
    source, result = (high << 32 | low).to_bytes(8, "little"), 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = source[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * place
    return result


def run(asm: str, operands: Sequence[int]) -> list[int]:
    """The 16-bit outputs $0-$7 that the inputs $8-$14 give."""
    registers = {f"${8 + i}": value for i, value in enumerate(operands)}
    for operation, arguments in re.findall(r"^(\w+)\.[bu]32 (.*);$", asm, re.MULTILINE):
        target, *sources = re.findall(r"\{[^}]*\}|[^,\s]+", arguments)
        a, *rest = (registers[source] if source in registers else int(source, 0) for source in sources)
        match operation:
            case "and":
                registers[target] = a & rest[0]
            case "add":
                registers[target] = (a + rest[0]) & 0xFFFFFFFF
            case "shr":
                registers[target] = a >> rest[0]
            case "prmt":
                registers[target] = permute_bytes(a, *rest)
            case "mov":
                first, second = re.findall(r"\$\d", target)
                registers |= {first: a & 0xFFFF, second: a >> 16}
    return [registers[f"${i}"] for i in range(8)]


@DTYPES
@pytest.mark.parametrize("word", ALL_CODES, ids=hex)
def test_every_code_is_decoded_to_its_number(dtype: torch.dtype, word: int) -> None:
    tables = [value & 0xFFFFFFFF for value in byte_tables(dtype).tolist()]
    expected = operands(dtype).view(torch.int16).int() & 0xFFFF
    low_halves = [word >> 8 * byte & 15 for byte in range(4)]
    high_halves = [word >> 8 * byte + 4 & 15 for byte in range(4)]
    assert run(DECODE_ASM.value, [word, *tables]) == expected[low_halves + high_halves].tolist()


@DTYPES
def test_neighbours_share_their_high_byte_and_differ_by_less_than_half_a_low_one(dtype: torch.dtype) -> None:
    bits = operands(dtype).view(torch.int16).int() & 0xFFFF
    larger, smaller = bits[:8], bits[8:]
    assert torch.equal(larger >> 8, smaller >> 8)
    assert ((larger - smaller >= 0) & (larger - smaller < 128)).all()


def test_recoding_loses_no_code() -> None:
    assert sorted(RECODED) == list(range(16))
    assert torch.equal(nf4_values()[list(RECODED)], torch.tensor(NF4.values, device="cpu"))


@DTYPES
def test_the_scale_has_the_least_squared_error_and_the_error_is_below_that_of_bfloat16(dtype: torch.dtype) -> None:
    exact, codebook = nf4_values().double(), CODEBOOKS[dtype]
    multiples = operands(dtype).double() / codebook.smallest
    assert codebook.steps == pytest.approx(float(multiples.square().sum() / (multiples * exact).sum()), rel=1e-6)
    error = (multiples / codebook.steps - exact).square().mean().sqrt()
    assert error < 4.3e-4 < (exact.bfloat16().double() - exact).square().mean().sqrt()


@DTYPES
def test_the_numbers_times_their_scales_are_nf4(dtype: torch.dtype) -> None:
    codebook = CODEBOOKS[dtype]
    products = operands(dtype).double() * codebook.input_scale * codebook.output_scale
    torch.testing.assert_close(products, nf4_values().double(), rtol=0, atol=1e-3)
