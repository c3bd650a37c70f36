"""Norm, rope, activation and cache writes against Transformers' and torch's own."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import onebase_kernels as kernels


@pytest.mark.parametrize("rows", [1, 1200])
@pytest.mark.parametrize(("dtype", "one_ulp"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_rms_norm_is_llamas(backend: str, dtype: torch.dtype, one_ulp: float, rows: int) -> None:
    norm = LlamaRMSNorm(40, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(rows, 3, 40).to(dtype)
    expected = norm(x).detach()
    torch.testing.assert_close(kernels.rms_norm(x, norm.weight.data, 1e-5), expected, rtol=one_ulp, atol=1e-6)


@pytest.mark.parametrize("head_size", [16, 64])
def test_rope_rotates_q_and_k_in_place_even_when_they_are_slices(backend: str, head_size: int) -> None:
    qkv = torch.randn(7, 5, head_size)
    q, k, v = torch.split(qkv, [3, 1, 1], dim=1)
    angles = torch.rand(7, head_size // 2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).unsqueeze(0) for f in (torch.cos, torch.sin))
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    before = v.clone()
    kernels.apply_rope_(q, k, angles.cos(), angles.sin())
    torch.testing.assert_close(qkv[:, :3], expected[0][0].transpose(0, 1))
    torch.testing.assert_close(qkv[:, 3:4], expected[1][0].transpose(0, 1))
    assert torch.equal(qkv[:, 4:], before)


def test_rope_in_bfloat16_rounds_once(backend: str) -> None:
    q, k, angles = torch.randn(7, 3, 16).bfloat16(), torch.randn(7, 1, 16).bfloat16(), torch.rand(7, 8) * 6
    wide_q, wide_k = q.float(), k.float()
    kernels.apply_rope_(wide_q, wide_k, angles.cos(), angles.sin())
    kernels.apply_rope_(q, k, angles.cos(), angles.sin())
    assert torch.equal(q, wide_q.bfloat16())
    assert torch.equal(k, wide_k.bfloat16())


def test_silu_mul_gates_the_upper_half(backend: str) -> None:
    gate_up = 8 * torch.randn(4, 100)
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])  # where e^x leaves the range of fp32
    torch.testing.assert_close(kernels.silu_mul(gate_up), F.silu(gate_up[:, :50]) * gate_up[:, 50:])


@pytest.mark.parametrize("rows", [1, 16, 33, 200])
@pytest.mark.parametrize(("vocab", "size"), [(64, 96), (40, 48)])
def test_head_logits_are_products_in_fp32(backend: str, vocab: int, size: int, rows: int) -> None:
    hidden, head = torch.randn(rows, size), torch.randn(vocab, size)
    logits = kernels.head_logits(hidden.bfloat16(), head.bfloat16())
    assert logits.dtype == torch.float32
    expected = hidden.bfloat16().float() @ head.bfloat16().float().T
    torch.testing.assert_close(logits, expected, rtol=2**-7, atol=0.1)
    torch.testing.assert_close(kernels.head_logits(hidden, head), hidden @ head.T)


def test_write_kv_writes_its_slots_and_nothing_else(backend: str) -> None:
    k_cache, v_cache = torch.full((4, 3, 2, 5), torch.nan), torch.full((4, 3, 2, 5), torch.nan)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    slots = torch.tensor([10, 0, 5])
    kernels.write_kv_(k, v, k_cache, v_cache, slots)
    for rows, cache in ((k, k_cache), (v, v_cache)):
        assert torch.equal(cache.view(12, 2, 5)[slots], rows)
        assert cache.isnan().sum() == cache.numel() - rows.numel()
