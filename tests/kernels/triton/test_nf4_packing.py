"""The order of codes and scales: nothing is lost, and what does not fit it is not packed."""

import pytest
import torch

from onebase_kernels import WeightGroup, dequantize, quantize_nf4
from onebase_kernels.triton import backend, nf4_linear
from onebase_kernels.triton.nf4_packing import can_pack, pack


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("widths", "in_features"),
    [((64,), 64), ((128, 64), 256), ((64, 64), 320)],
    ids=["one tile", "nested scales are decoded in the kernel", "nested scales end within four blocks"],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_weights_are_what_they_were(widths: tuple[int, ...], in_features: int, double_quant: bool) -> None:
    weights = [quantize_nf4(torch.randn(n, in_features) * 0.02, double_quant) for n in widths]
    packed = pack(weights)
    expected = torch.cat([dequantize(weight, torch.float32) for weight in weights])
    found, *halves = (
        torch.cat([nf4_linear.dequantize(packed, tile, 1, dtype) for tile in range(sum(widths) // 64)])
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    # The reference rounds between the product and the sum of a nested scale, a GPU does not.
    torch.testing.assert_close(found, expected, rtol=1e-6 if double_quant else 0, atol=0)
    for half in halves:
        assert (half.float() - expected).norm() / expected.norm() < 2e-3


def test_double_quantisation_stays_a_little_over_four_bits_a_weight() -> None:
    packed = pack([quantize_nf4(torch.randn(n, 1024)) for n in (512, 64)])
    assert 8 * packed.nbytes / packed.num_parameters == pytest.approx(4.128, abs=0.001)
    assert packed.widths == (512, 64)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_shapes_that_are_no_whole_tiles_go_to_the_reference(shape: tuple[int, int]) -> None:
    weight = quantize_nf4(torch.randn(shape))
    assert not can_pack([weight])
    packed = backend.pack_quantized([weight])
    assert isinstance(packed, WeightGroup)
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(backend.quantized_linear(x, packed), x @ dequantize(weight, torch.float32).T)
