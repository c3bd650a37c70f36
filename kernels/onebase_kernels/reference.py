"""Every op in readable torch: the definition of right, which the fast back ends are tested against.

T = tokens of the step, all requests one after another without padding. Nothing here is fast on purpose.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from onebase_kernels import int8_matrices
from onebase_kernels.batch import (
    AttentionBatch,
    FilePlan,
    LoraBatch,
    Matrix,
    ReplacedRows,
    SamplingBatch,
    StepInputs,
)
from onebase_kernels.quantized import (
    PackedWeights,
    QuantizedWeight,
    WeightGroup,
    dequantize,
    join_linears,
    unpacked,
)
from onebase_kernels.screen import HeadScreen


def pack_quantized(weights: Sequence[QuantizedWeight]) -> PackedWeights:
    """Weights [Nᵢ, K] of a projection group, once at load, as `quantized_linear` reads them fastest."""
    return WeightGroup(tuple(weights))


def unpack_quantized(packed: PackedWeights) -> tuple[QuantizedWeight, ...]:
    """The weights that the same back end's `pack_quantized` was given, or ones that dequantise to the same numbers."""
    return unpacked(packed).weights


def pack_dense(weight: Tensor) -> Tensor:
    """A weight that is not quantised, once at load, where `dense_linear` and `head_logits` read it fastest."""
    return weight


def pack_screen(head: Tensor) -> HeadScreen | None:
    """What `best_tokens` reads in place of most of an output head [V, K], once at load; None: it would gain nothing."""
    return None


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what stays and is read at every step, not cleared: weights, adapters."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def allocate_kv(num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All layers' caches of keys and values, not cleared: [layers, 2, blocks, block, Hkv, D] however they lie."""
    return torch.empty((num_layers, 2, *shape), dtype=dtype, device=device)


def record(forward: Callable[[StepInputs], Tensor], largest: StepInputs) -> Callable[[StepInputs], Tensor]:
    """`forward`, to be called for every step, with as little between its ops as can be.

    It may be called here, on inputs that stand for any step's, and never again: what it does besides the ops is not
    repeated. What a step returns lasts until the next. No step has more tokens or requests than `largest`, longer
    contexts or wider block tables; all use its arena. A step's own tensors may lie on the host.
    """
    device = largest.lora.arena.device
    return lambda inputs: forward(inputs.to(device))


def embed(token_ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """`scale · table[token]` for each token: token_ids int64 [T], table [V, K] → [T, K]."""
    rows = F.embedding(token_ids, table)
    return rows if scale == 1 else rows * scale


def replace_rows_(x: Tensor, replaced: ReplacedRows | None) -> None:
    """`x[rows] = vectors`, in place: x [T, K] and vectors [n, K] of one dtype, rows int64 [n]; None is no row."""
    if replaced is not None:
        x[replaced.rows] = replaced.vectors


def quantized_linear(x: Tensor, packed: PackedWeights, bias: Tensor | None = None) -> Tensor:
    """`yᵢ = x Wᵢᵀ + bᵢ`, side by side: x [T, K], Wᵢ [Nᵢ, K] quantised, bias [ΣNᵢ] → y [T, ΣNᵢ], in x's dtype.

    `packed` is what the same back end's `pack_quantized` made of the weights.
    """
    return join_linears(packed, lambda weight: F.linear(x, dequantize(weight, x.dtype)), bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x Wᵀ + b` of a base that is not quantised: x [T, K], W [N, K], bias [N] → y [T, N]."""
    return F.linear(x, weight, bias)


def start_lora(x: Tensor, lora: LoraBatch, place: int, widths: Sequence[int]) -> object:
    """Begin what `add_lora_` can compute before there is a y, to run beside the product that makes y.

    What is returned goes to `add_lora_`, which must follow; None where nothing has begun.
    """
    return None


def add_lora_(y: Tensor, x: Tensor, lora: LoraBatch, place: int, widths: Sequence[int], started: object = None) -> None:
    """Add each segment's adapter to its rows of y: `y[start:stop, slice i] += (x[start:stop] Aᵢᵀ) Bᵢᵀ`.

    Then, in the slices that have an epilogue, `y ← (1 + gainᵢ) ⊙ y + shiftᵢ`, alike for all rows of the segment (DoRA's
    magnitudes, IA³'s vectors, biases). y [T, ΣNᵢ] and x [T, K] are a projection group's output and input, widths its
    (N₀, …). `lora.arena` holds all adapters' numbers; a row `lora.table[place, slot]` is `(offset, r₀, r₁, r₂,
    epilogues)`: at `offset` lie A₀… stacked as [Σrᵢ, K], then each Bᵢ transposed, [rᵢ, Nᵢ], the scale folded in, then
    gainᵢ and shiftᵢ, [Nᵢ] each, of every slice whose bit i is set in `epilogues`. A gain is the factor less one, as
    that is near 0, where bfloat16 is finer than near 1. Rank 0 is a slice without a low-rank update; rows of y in no
    segment are not touched. `started` is what `start_lora` returned for the same x and place. (LoRA, arXiv 2106.09685;
    the batched form is Punica's, arXiv 2310.18547.)

    Where `lora.is_int8`, A and the Bᵢ are bytes that stand for `scale · (byte − 128)`, with a scale for each of their
    rows: at `offset`, a multiple of 64 bytes, lie the fp32 scales of A, [Σrᵢ], and of all Bᵢ, [Σrᵢ], filled up to
    whole 64 bytes, then the bytes of A and the Bᵢ, then gains and shifts as above. K and all widths are multiples of 4.
    """
    for slot, start, stop in lora.segments:
        add_adapter_(y[start:stop], x[start:stop], lora, lora.table[place, slot], widths, torch.float32)


def copy_matrices_(target: Tensor, matrices: Sequence[Matrix]) -> None:
    """Lay an adapter's matrices out in `target` [E] on the host: each at its offset, scaled and turned as it says.

    One that has `scales` becomes bytes, by the largest magnitude of each of its rows.
    """
    for source, offset, scale, is_transposed, scales in matrices:
        matrix = source.float() * scale if scale != 1 else source
        matrix = matrix.T if is_transposed else matrix
        if scales is None:
            target[offset : offset + matrix.numel()].view(matrix.shape).copy_(matrix)
        else:
            int8_matrices.encode_(target, offset, scales, matrix)


def copy_file_matrices_(target: Tensor, file: Tensor, plan: FilePlan) -> None:
    """As `copy_matrices_`, of matrices in a file, uint8 [size] on the host, by a plan that was made once for many."""
    copy_matrices_(target, [matrix.of(file) for matrix in plan.matrices])


def add_adapter_(
    y: Tensor, x: Tensor, lora: LoraBatch, row: Tensor, widths: Sequence[int], compute_dtype: torch.dtype
) -> None:
    """`add_lora_` for rows that all use the adapter at one row of the table, the products taken in `compute_dtype`."""
    offset, *ranks, epilogues = row.tolist()
    if not any(ranks) and not epilogues:
        return
    lora_a, lora_b, end = _matrices_at(lora, offset, ranks, x.shape[1], widths)
    shrunk = torch.split(x.to(compute_dtype) @ lora_a.to(compute_dtype).T, ranks[: len(widths)], dim=1)
    slices = torch.split(y, list(widths), dim=1)
    for part, shrunk_part, matrix in zip(slices, shrunk, lora_b, strict=True):
        part += shrunk_part @ matrix.to(compute_dtype)
    for index, (width, part) in enumerate(zip(widths, slices, strict=True)):
        if epilogues >> index & 1:
            gain, shift = lora.arena[end : end + 2 * width].view(2, width).to(compute_dtype)
            part += part * gain + shift
            end += 2 * width


def _matrices_at(
    lora: LoraBatch, offset: int, ranks: list[int], in_features: int, widths: Sequence[int]
) -> tuple[Tensor, list[Tensor], int]:
    """A of all slices, each slice's B, and where what follows them begins."""
    arena, total_rank = lora.arena, sum(ranks)
    start = offset + (int8_matrices.scales_size(total_rank, arena.dtype) if lora.is_int8 else 0)
    matrices = []
    for shape in ((total_rank, in_features), *zip(ranks, widths, strict=False)):  # which leaves some ranks unused
        matrices.append(int8_matrices.part(arena, start, shape, torch.uint8 if lora.is_int8 else arena.dtype))
        start += matrices[-1].nbytes // arena.itemsize
    if lora.is_int8:
        of_a, of_b = int8_matrices.part(arena, offset, (2, total_rank), torch.float32)
        scales = (of_a, *of_b.split(ranks[: len(widths)]))
        matrices = list(map(int8_matrices.decode, matrices, scales))
    return matrices[0], matrices[1:], start


def write_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """`cache[slot // block, slot % block] = row` for each token's row of k and v [T, Hkv, D] and its slot.

    Caches are [blocks, block, Hkv, D]; `batch.slot_mapping` has the slots.
    """
    where = (batch.slot_mapping // k_cache.shape[1], batch.slot_mapping % k_cache.shape[1])
    k_cache[where] = k
    v_cache[where] = v


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`softmax(scale · q Kᵀ) V` over each token's own request, causally: q [T, H, D] → [T, H, D].

    The keys and values of a token at position p are those in the request's cache blocks at positions ≤ p (and > p −
    window, if there is a window), this step's own among them. Query head h reads KV head ⌊h · Hkv / H⌋. Scores and
    softmax are fp32; a softcap limits the scores as `softcap_` does.
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
        if softcap is not None:
            softcap_(scores, softcap)
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


def add_rms_norm_(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden += delta`, in place, then `rms_norm` of the sum; all [T, K]."""
    hidden += delta
    return rms_norm(hidden, weight, eps)


def add_(hidden: Tensor, delta: Tensor, scale: float = 1.0) -> None:
    """`hidden += scale · delta`, in place and rounded once; both [T, K]."""
    hidden.copy_(hidden.float() + scale * delta.float())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`(x − mean(x)) / √(var(x) + eps) · weight + bias` over the rows of x [T, K], in fp32 (arXiv 1607.06450)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def apply_rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotate the pairs (i, i + R/2) of every head of q [T, H, D] and k [T, Hkv, D] by the token's angles, in place.

    `(a, b) ← (a cos − b sin, b cos + a sin)` in fp32, with cos and sin fp32 [positions, R/2] and a row of them for each
    of `positions`, int64 [T]; a head's numbers from R ≤ D on stay as they are (arXiv 2104.09864).
    """
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    for heads in (q, k):
        rotated = heads[..., : 2 * cos.shape[-1]]
        first, second = rotated.float().chunk(2, dim=-1)
        rotated.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def head_logits(hidden: Tensor, head: Tensor | PackedWeights) -> Tensor:
    """`hidden Wᵀ` in fp32: hidden [R, K], the output head W [V, K], dense or packed NF4 → [R, V]."""
    return (F.linear(hidden, head) if isinstance(head, Tensor) else quantized_linear(hidden, head)).float()


def best_tokens(hidden: Tensor, head: Tensor, screen: HeadScreen | None) -> Tensor:
    """The token of each row's largest logit, of equals the first: hidden [R, K], head [V, K] → int64 [R].

    `screen` is what `pack_screen` made of the head. With or without it the tokens are the same.
    """
    return head_logits(hidden, head).argmax(dim=-1)


def softcap_(scores: Tensor, cap: float) -> None:
    """`cap · tanh(score / cap)`, in place: fp32 scores that go no further than ±cap (arXiv 2408.00118)."""
    scores.div_(cap).tanh_().mul_(cap)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up` of gate_up [T, 2I], the gate's columns first → [T, I] (SwiGLU, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """`gelu(gate) · up`, gelu by its tanh form; operands as in `silu_mul` (GEGLU, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def choose_tokens(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """One token id for each row of fp32 logits [R, V], by that row's parameters alone → int64 [R].

    The tokens that survive top-k, then top-p (arXiv 1904.09751; a share of what top-k left) and min-p (arXiv
    2407.01082) are put in a row, the likeliest first, or all tokens in their own order where nothing limits them by
    rank; the one is taken at which the cumulative mass exceeds the row's `uniform` share of the whole.
    """
    tokens = logits.argmax(dim=-1)
    is_ranked = (sampling.top_k > 0) | (sampling.top_p < 1)
    is_random = sampling.temperature > 0
    for rows, limit in ((is_random & ~is_ranked, _limit_min_p), (is_random & is_ranked, _limit_ranks)):
        if not rows.any():
            continue
        probs = torch.softmax(logits[rows] / sampling.temperature[rows].unsqueeze(-1), dim=-1)
        kept, order = limit(probs, sampling, rows)
        chosen = _invert_cdf(kept, sampling.uniform[rows].unsqueeze(-1))
        tokens[rows] = chosen if order is None else order.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return tokens


def _limit_min_p(probs: Tensor, sampling: SamplingBatch, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Probabilities in the tokens' own order, 0 where min-p drops them."""
    best = probs.amax(dim=-1, keepdim=True)
    return probs.masked_fill(probs < sampling.min_p[rows].unsqueeze(-1) * best, 0.0), None


def _limit_ranks(probs: Tensor, sampling: SamplingBatch, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Probabilities, the largest first and 0 where a limit drops them, and whose they are."""
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    top_k, top_p, min_p = (limit[rows].unsqueeze(-1) for limit in (sampling.top_k, sampling.top_p, sampling.min_p))
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    probs = probs.masked_fill((top_k > 0) & (ranks >= top_k), 0.0)
    before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
    outside = (before >= top_p * probs.sum(dim=-1, keepdim=True)) | (probs < min_p * probs[:, :1])
    outside[:, 0] = False
    return probs.masked_fill(outside, 0.0), order


def _invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The first index at which the cumulative mass exceeds `uniform` of the total; a token of mass 0 is never it."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return found.squeeze(-1).clamp_max(probs.shape[-1] - 1)


def set_num_threads(count: int) -> None:
    """How many CPU threads compute, the caller's own among them."""
    torch.set_num_threads(count)
