"""The C++ library as a whole: which variant is chosen, and whose threads it uses."""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import onebase_kernels as kernels
from onebase_kernels.cpu.build import VARIANTS
from onebase_kernels.cpu.library import LibraryUnavailable, load_library, runnable_variants, why_not

pytestmark = pytest.mark.skipif(not runnable_variants(), reason="no C++ compiler was there when Onebase was installed")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_portable_variant_runs_everywhere() -> None:
    assert runnable_variants()[-1] == "portable"


def test_a_variant_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase_kernels.cpu.library.cpu_flags", lambda: frozenset({"avx2", "fma"}))
    why_not.cache_clear()
    load_library.cache_clear()
    try:
        assert why_not("avx2") == "the machine lacks bmi1, bmi2, f16c"
        with pytest.raises(LibraryUnavailable, match="amx: the machine lacks amx_bf16"):
            load_library("amx")
    finally:
        why_not.cache_clear()
        load_library.cache_clear()


def test_it_brings_no_second_pool_of_threads() -> None:
    program = (
        "import onebase_kernels as kernels; kernels.use_backend('cpu');"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rpartition('/')[2]})"
    )
    maps = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert len(ast.literal_eval(maps)) == 1, maps


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_threads_give_the_bits_of_one(variant: str, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not(variant):
        pytest.skip(why_not(variant) or "")
    monkeypatch.setattr("onebase_kernels.cpu.backend._library", load_library(variant))
    kernels.use_backend("cpu")
    try:
        packed = kernels.pack_nf4([kernels.quantize_nf4(torch.randn(n, 256)) for n in (512, 128, 128)])
        for rows in (1, 3, 40):
            x = torch.randn(rows, 256).bfloat16()
            shared = kernels.nf4_linear(x, packed)
            torch.set_num_threads(1)
            assert torch.equal(kernels.nf4_linear(x, packed), shared)
            torch.set_num_threads(2)
    finally:
        kernels.use_backend("reference")
