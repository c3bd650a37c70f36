"""Norm, rope, activation and cache writes against Transformers' and torch's own."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

import onebase_kernels as kernels
from onebase_kernels import AttentionBatch, ReplacedRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_replaced_become_the_vectors_and_no_others(backend: str, dtype: torch.dtype) -> None:
    hidden, vectors = torch.randn(5, 40).to(dtype), torch.randn(2, 40).to(dtype)
    expected = hidden.clone()
    kernels.replace_rows_(hidden, None)
    assert torch.equal(hidden, expected)
    expected[3], expected[0] = vectors
    kernels.replace_rows_(hidden, ReplacedRows(torch.tensor([3, 0]), vectors))
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("rows", [1, 1200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
def test_rms_norm_is_llamas(backend: str, dtype: torch.dtype, tolerance: float, rows: int) -> None:
    # bfloat16 is rounded twice, before the weight and after it, and sums in another order may turn each the other way.
    norm = LlamaRMSNorm(40, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(rows, 3, 40).to(dtype)
    expected = norm(x).detach()
    torch.testing.assert_close(kernels.rms_norm(x, norm.weight.data, 1e-5), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_keeps_the_sum_and_returns_its_norm(backend: str, dtype: torch.dtype) -> None:
    hidden, delta, weight = torch.randn(5, 72).to(dtype), torch.randn(5, 72).to(dtype), torch.randn(72).to(dtype)
    total = hidden + delta
    normed = kernels.add_rms_norm_(hidden, delta, weight, 1e-5)
    assert torch.equal(hidden, total)
    assert torch.equal(normed, kernels.rms_norm(total, weight, 1e-5))


def test_heads_are_normed_one_by_one_even_when_they_are_slices(backend: str) -> None:
    qkv, weight = torch.randn(4, 5, 32), torch.randn(32)
    k = qkv[:, 2:4]
    torch.testing.assert_close(kernels.rms_norm(k, weight, 1e-5), kernels.rms_norm(k.contiguous(), weight, 1e-5))


@pytest.mark.parametrize(("dtype", "one_ulp"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("rows", [1, 600])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_is_torchs(backend: str, dtype: torch.dtype, one_ulp: float, rows: int, has_bias: bool) -> None:
    x, weight = (3 * torch.randn(rows, 40) + 2).to(dtype), torch.randn(40).to(dtype)
    bias = torch.randn(40).to(dtype) if has_bias else None
    wide_bias = None if bias is None else bias.float()
    expected = F.layer_norm(x.float(), (40,), weight.float(), wide_bias, 1e-5).to(dtype)
    torch.testing.assert_close(kernels.layer_norm(x, weight, bias, 1e-5), expected, rtol=one_ulp, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_scales_what_it_adds_and_rounds_once(backend: str, dtype: torch.dtype) -> None:
    hidden, delta = torch.randn(500, 72).to(dtype), torch.randn(500, 72).to(dtype)
    expected = (hidden.float() + 0.22 * delta.float()).to(dtype)
    kernels.add_(hidden, delta, 0.22)
    torch.testing.assert_close(hidden, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embed_takes_each_tokens_row(backend: str, dtype: torch.dtype) -> None:
    table, tokens = torch.randn(11, 22).to(dtype), torch.tensor([3, 10, 0, 3])
    assert torch.equal(kernels.embed(tokens, table), table[tokens])
    assert torch.equal(kernels.embed(tokens, table, scale=7.5), table[tokens] * 7.5)


@pytest.mark.parametrize(("head_size", "rotated"), [(16, 16), (64, 64), (80, 20), (96, 72)])
def test_rope_rotates_q_and_k_in_place_even_when_they_are_slices(backend: str, head_size: int, rotated: int) -> None:
    qkv = torch.randn(7, 5, head_size)
    q, k, v = torch.split(qkv, [3, 1, 1], dim=1)
    angles, positions = torch.rand(9, rotated // 2) * 6, torch.tensor([3, 0, 8, 8, 1, 2, 7])
    cos, sin = (torch.cat([f(angles[positions])] * 2, dim=-1).unsqueeze(0) for f in (torch.cos, torch.sin))
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    before = v.clone()
    kernels.apply_rope_(q, k, angles.cos(), angles.sin(), positions)
    torch.testing.assert_close(qkv[:, :3], expected[0][0].transpose(0, 1))
    torch.testing.assert_close(qkv[:, 3:4], expected[1][0].transpose(0, 1))
    assert torch.equal(qkv[:, 4:], before)


def test_rope_in_bfloat16_rounds_once(backend: str) -> None:
    q, k, angles = torch.randn(7, 3, 16).bfloat16(), torch.randn(7, 1, 16).bfloat16(), torch.rand(7, 8) * 6
    wide_q, wide_k, positions = q.float(), k.float(), torch.arange(7)
    kernels.apply_rope_(wide_q, wide_k, angles.cos(), angles.sin(), positions)
    kernels.apply_rope_(q, k, angles.cos(), angles.sin(), positions)
    assert torch.equal(q, wide_q.bfloat16())
    assert torch.equal(k, wide_k.bfloat16())


def test_silu_mul_gates_the_upper_half(backend: str) -> None:
    gate_up = 8 * torch.randn(4, 100)
    torch.testing.assert_close(kernels.silu_mul(gate_up), F.silu(gate_up[:, :50]) * gate_up[:, 50:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul_is_right_where_e_to_the_x_leaves_the_range_of_fp32(backend: str, dtype: torch.dtype) -> None:
    gate = torch.cat([torch.tensor([-1e9, 1e9]), torch.arange(-300, 300, 0.25)]).to(dtype).unsqueeze(0)
    torch.testing.assert_close(kernels.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1)), F.silu(gate))


def test_gelu_mul_gates_the_upper_half(backend: str) -> None:
    gate_up = 3 * torch.randn(4, 100)
    gate_up[0, :40] = torch.tensor(
        [*range(-20, 10), -200, 200, -1e4, 1e4, -1e9, 1e9, *[0] * 4]
    )  # where e^-2u leaves fp32
    expected = F.gelu(gate_up[:, :50], approximate="tanh") * gate_up[:, 50:]
    torch.testing.assert_close(kernels.gelu_mul(gate_up), expected, rtol=1e-5, atol=2e-6)
    rounded = gate_up.bfloat16()
    expected = F.gelu(rounded[:, :50], approximate="tanh") * rounded[:, 50:]
    torch.testing.assert_close(kernels.gelu_mul(rounded), expected)


def test_softcap_bounds_smoothly_and_in_place(backend: str) -> None:
    scores = torch.tensor([[-1e6, -2.0, 0.0, 1e-3, 2.0, 1e6]])
    expected = 5.0 * torch.tanh(scores / 5.0)
    kernels.softcap_(scores, 5.0)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("rows", [1, 16, 33, 200])
@pytest.mark.parametrize(("vocab", "size"), [(64, 96), (40, 48)])
def test_head_logits_are_products_in_fp32(backend: str, vocab: int, size: int, rows: int) -> None:
    hidden, head = torch.randn(rows, size), torch.randn(vocab, size)
    logits = kernels.head_logits(hidden.bfloat16(), head.bfloat16())
    assert logits.dtype == torch.float32
    expected = hidden.bfloat16().float() @ head.bfloat16().float().T
    torch.testing.assert_close(logits, expected, rtol=2**-7, atol=0.1)
    torch.testing.assert_close(kernels.head_logits(hidden, head), hidden @ head.T)


def test_head_logits_of_a_head_in_nf4_are_fp32(backend: str) -> None:
    head, hidden = kernels.quantize_nf4(torch.randn(64, 128)), torch.randn(3, 128)
    expected = hidden @ kernels.dequantize(head, torch.float32).T
    logits = kernels.head_logits(hidden.bfloat16(), kernels.pack_quantized([head]))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=2**-6, atol=0.3)


def test_write_kv_writes_its_slots_and_nothing_else(backend: str) -> None:
    k_cache, v_cache = torch.full((4, 3, 2, 5), torch.nan), torch.full((4, 3, 2, 5), torch.nan)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    slots = torch.tensor([10, 0, 5])
    batch = AttentionBatch((0, 3), (3,), torch.zeros(1, 1, dtype=torch.int32), slots)
    kernels.write_kv_(k, v, k_cache, v_cache, batch)
    for rows, cache in ((k, k_cache), (v, v_cache)):
        assert torch.equal(cache.view(12, 2, 5)[slots], rows)
        assert cache.isnan().sum() == cache.numel() - rows.numel()
