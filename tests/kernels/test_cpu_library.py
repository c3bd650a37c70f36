"""The C++ library as a whole: which variant is chosen, and its threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import LoraBatch, Segment
from onebase_kernels.cpu.build import VARIANTS
from onebase_kernels.cpu.library import LibraryUnavailable, load_library, runnable_variants, why_not

pytestmark = pytest.mark.skipif(not runnable_variants(), reason="no C++ compiler was there when Onebase was installed")


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_threads_give_the_bits_of_one(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not(variant):
        pytest.skip(why_not(variant) or "")
    library = load_library(variant)
    monkeypatch.setattr("onebase_kernels.cpu.execution.library", library)
    kernels.use_backend("cpu")
    packed = kernels.pack_quantized([kernels.quantize_nf4(torch.randn(n, 256)) for n in (512, 128, 128)])
    head = torch.randn(4096, 256).bfloat16()
    screen = kernels.pack_screen(head)
    ranks = torch.tensor([[[0, 8, 8, 8, 0], [3 * 8 * 512, 4, 0, 64, 0]]])
    widths, arena = (512, 128, 128), torch.randn(70_000).bfloat16()

    def adapted(x: Tensor) -> Tensor:
        lora = LoraBatch(arena, ranks, (Segment(0, 0, len(x) // 2), Segment(1, len(x) // 2, len(x))))
        started = kernels.start_lora(x, lora, 0, widths)
        y = kernels.quantized_linear(x, packed)
        kernels.add_lora_(y, x, lora, 0, widths, started)
        return y

    try:
        for rows in (1, 3, 40):
            x = torch.randn(rows, 256).bfloat16()
            alone = adapted(x), kernels.head_logits(x, head), kernels.best_tokens(x, head, screen)
            library.onebase_set_threads(3)
            for _ in range(200):  # threads that fall asleep, that are late, that have nothing left to do
                assert torch.equal(adapted(x), alone[0])
                assert torch.equal(kernels.head_logits(x, head), alone[1])
                assert torch.equal(kernels.best_tokens(x, head, screen), alone[2])
            library.onebase_set_threads(1)
    finally:
        kernels.use_backend("reference")


def test_ops_may_be_called_from_several_threads() -> None:
    kernels.use_backend("cpu")
    library = load_library()
    library.onebase_set_threads(2)
    packed = kernels.pack_quantized([kernels.quantize_nf4(torch.randn(512, 256))])
    x = torch.randn(4, 256).bfloat16()
    expected = kernels.quantized_linear(x, packed)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: kernels.quantized_linear(x, packed), range(400)))
        assert all(torch.equal(result, expected) for result in results)
    finally:
        library.onebase_set_threads(1)
        kernels.use_backend("reference")
