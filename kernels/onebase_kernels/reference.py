"""Every op in readable torch: the definition of right, which the fast back ends are tested against.

T = tokens of the step, all requests one after another without padding. Nothing here is fast on purpose.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from onebase_kernels.batch import AttentionBatch, Segment
from onebase_kernels.nf4 import Nf4Group, Nf4Weight, PackedNf4, dequantize_nf4, join_linears


def pack_nf4(weights: Sequence[Nf4Weight]) -> PackedNf4:
    """Weights [Nᵢ, K] of a projection group, once at load, in the order in which `nf4_linear` reads them fastest."""
    return Nf4Group(tuple(weights))


def nf4_linear(x: Tensor, packed: PackedNf4) -> Tensor:
    """`yᵢ = x Wᵢᵀ`, side by side: x [T, K], Wᵢ [Nᵢ, K] in NF4 → y [T, ΣNᵢ], in x's dtype.

    `packed` is what the same back end's `pack_nf4` made of the weights.
    """
    return join_linears(packed, lambda weight: F.linear(x, dequantize_nf4(weight, x.dtype)))


def add_lora_(
    y: Tensor, x: Tensor, arena: Tensor, table: Tensor, widths: Sequence[int], segments: Sequence[Segment]
) -> None:
    """Add each segment's adapter to its rows of y: `y[start:stop, slice i] += (x[start:stop] Aᵢᵀ) Bᵢᵀ`.

    y [T, ΣNᵢ] and x [T, K] are a projection group's output and input, widths its (N₀, …). arena [E] holds all adapters'
    numbers; row `table[slot]` (int64 [slots, 4]) is `(offset, r₀, r₁, r₂)`: at `offset` lie A₀… stacked as [Σrᵢ, K],
    then each Bᵢ transposed, [rᵢ, Nᵢ], the scale folded in. Rank 0 is a slice that the adapter leaves alone; rows of y
    in no segment are not touched. (LoRA, arXiv 2106.09685; the batched form is Punica's, arXiv 2310.18547.)
    """
    for slot, start, stop in segments:
        add_adapter_(y[start:stop], x[start:stop], arena, table[slot], widths, torch.float32)


def add_adapter_(
    y: Tensor, x: Tensor, arena: Tensor, row: Tensor, widths: Sequence[int], compute_dtype: torch.dtype
) -> None:
    """`add_lora_` for rows that all use the adapter at one row of the table, the products taken in `compute_dtype`."""
    in_features = x.shape[1]
    offset, *ranks = row.tolist()
    if not any(ranks):
        return
    end = offset + sum(ranks) * in_features
    lora_a = arena[offset:end].view(-1, in_features)
    shrunk = x.to(compute_dtype) @ lora_a.to(compute_dtype).T
    column = first = 0
    for rank, width in zip(ranks, widths, strict=False):  # groups of fewer than three slices leave ranks unused
        if rank:
            lora_b = arena[end : end + rank * width].view(rank, width)
            y[:, column : column + width] += shrunk[:, first : first + rank] @ lora_b.to(compute_dtype)
            end += rank * width
        column += width
        first += rank


def write_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`cache[slot // block, slot % block] = row` for each token's row of k and v [T, Hkv, D].

    Caches are [blocks, block, Hkv, D], slot_mapping int64 [T].
    """
    k_cache.view(-1, *k.shape[1:])[slot_mapping] = k
    v_cache.view(-1, *v.shape[1:])[slot_mapping] = v


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, window: int | None = None
) -> Tensor:
    """`softmax(scale · q Kᵀ) V` over each token's own request, causally: q [T, H, D] → [T, H, D].

    The keys and values of a token at position p are those in the request's cache blocks at positions ≤ p (and > p −
    window, if there is a window), this step's own among them. Query head h reads KV head ⌊h · Hkv / H⌋. Scores and
    softmax are fp32.
    """
    out = torch.empty_like(q)
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    heads_per_kv = q.shape[1] // kv_heads
    for s, (context_len, query_len) in enumerate(zip(batch.context_lens, batch.query_lens, strict=True)):
        rows = slice(batch.query_starts[s], batch.query_starts[s + 1])
        blocks = batch.block_tables[s, : -(-context_len // block_size)].long()
        keys = k_cache[blocks].flatten(0, 1)[:context_len].float().repeat_interleave(heads_per_kv, dim=1)
        values = v_cache[blocks].flatten(0, 1)[:context_len].float().repeat_interleave(heads_per_kv, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * scale
        key_positions = torch.arange(context_len, device=q.device)
        query_positions = key_positions[context_len - query_len :].unsqueeze(1)
        hidden = key_positions > query_positions
        if window is not None:
            hidden |= key_positions <= query_positions - window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / √(mean(x²) + eps) · weight` over the last dimension (arXiv 1910.07467).

    The quotient is taken in fp32 and rounded to x's dtype before the product, as Llama's own code does.
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * weight


def apply_rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the pairs (i, i + D/2) of every head of q [T, H, D] and k [T, Hkv, D] by the token's angles, in place.

    `(a, b) ← (a cos − b sin, b cos + a sin)` in fp32, with cos and sin fp32 [T, D/2] (arXiv 2104.09864).
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    for heads in (q, k):
        first, second = heads.float().chunk(2, dim=-1)
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """`hidden Wᵀ` in fp32: hidden [R, K], the output head W [V, K] → [R, V]."""
    return F.linear(hidden, head).float()


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up` of gate_up [T, 2I], the gate's columns first → [T, I] (SwiGLU, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def set_num_threads(count: int) -> None:
    """How many CPU threads compute, the caller's own among them."""
    torch.set_num_threads(count)
