"""Paged attention through torch's fused `scaled_dot_product_attention`: keys and values are gathered, then attended to.

Requests that decode are padded to one call, for on a CPU a step of many small calls is slow. Padding never reads memory
that a request does not own, so that whatever lies there (NaN, another's keys) cannot leak.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from onebase_kernels import reference
from onebase_kernels.batch import AttentionBatch

_MAX_QUERIES = 128  # prefill goes in pieces of so many tokens: a piece attends to no key after its last token


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of one request: rows `start:stop` of the step, the last of them at `context_len - 1`."""

    request: int
    start: int
    stop: int
    context_len: int


@dataclass(frozen=True)
class _Call:
    """One call of the fused attention: P pieces of Q tokens each, padded to L keys."""

    rows: Tensor
    """int64 [P · Q]: the rows of the step."""
    slots: Tensor
    """int64 [P, L]: where each key lies in the cache; a padded one is the piece's last, once more."""
    mask: Tensor
    """[P, 1, Q, L], in the queries' dtype: 0 where a query sees a key, else -∞."""


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `reference.paged_attention`, which also computes what has a softcap: the fused attention knows none."""
    if softcap is not None:
        return reference.paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)
    out = torch.empty_like(q)
    k_slots, v_slots = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    for call in _plan(batch, k_cache.shape[1], window, q.dtype):
        out[call.rows] = _attend(q.index_select(0, call.rows), k_slots, v_slots, call, scale)
    return out


def _attend(q: Tensor, k_slots: Tensor, v_slots: Tensor, call: _Call, scale: float) -> Tensor:
    """q [P · Q, H, D] → [P · Q, H, D]; caches are [slots, Hkv, D]."""
    (pieces, num_keys), (_, heads, head_dim), kv_heads = call.slots.shape, q.shape, k_slots.shape[1]
    queries, group = len(q) // pieces, heads // kv_heads
    # The query heads of one KV head become further queries of it: [P, Hkv, group · Q, D].
    folded = q.view(pieces, queries, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    mask = call.mask.unsqueeze(2).expand(-1, -1, group, -1, -1)
    attended = F.scaled_dot_product_attention(
        folded.reshape(pieces, kv_heads, group * queries, head_dim),
        _gather(k_slots, call.slots).transpose(1, 2),
        _gather(v_slots, call.slots).transpose(1, 2),
        attn_mask=mask.reshape(pieces, 1, group * queries, num_keys),
        scale=scale,
    )
    unfolded = attended.view(pieces, kv_heads, group, queries, head_dim).permute(0, 3, 1, 2, 4)
    return unfolded.reshape(pieces * queries, heads, head_dim)


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """`cache[slots]`, four times as fast on the CPU: [slots, Hkv, D], [P, L] → [P, L, Hkv, D]."""
    return cache.index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[1:])


@lru_cache(maxsize=4)  # all layers of a step ask the same; models have at most two kinds of window
def _plan(batch: AttentionBatch, block_size: int, window: int | None, dtype: torch.dtype) -> tuple[_Call, ...]:
    return tuple(_call(pieces, batch, block_size, window, dtype) for pieces in _alike(_pieces(batch)))


def _pieces(batch: AttentionBatch) -> Iterator[_Piece]:
    for request, (context_len, query_len) in enumerate(zip(batch.context_lens, batch.query_lens, strict=True)):
        first = batch.query_starts[request]
        for start in range(0, query_len, _MAX_QUERIES):
            stop = min(start + _MAX_QUERIES, query_len)
            yield _Piece(request, first + start, first + stop, context_len - query_len + stop)


def _alike(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that share a call: those of a single token, as long as padding at most doubles the keys; others alone."""
    together: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.stop - piece.start, -piece.context_len)):
        joins = together and piece.stop - piece.start == 1 and 2 * piece.context_len >= together[0].context_len
        if together and not joins:
            yield together
            together = []
        together.append(piece)
    if together:
        yield together


def _call(
    pieces: list[_Piece], batch: AttentionBatch, block_size: int, window: int | None, dtype: torch.dtype
) -> _Call:
    device = batch.block_tables.device
    queries = pieces[0].stop - pieces[0].start
    context_lens = torch.tensor([piece.context_len for piece in pieces], device=device).unsqueeze(1)
    first_keys = (context_lens - queries - window + 1).clamp(min=0) if window else torch.zeros_like(context_lens)
    keys = first_keys + torch.arange(int((context_lens - first_keys).max()), device=device)
    owned = torch.minimum(keys, context_lens - 1)
    blocks = batch.block_tables[[piece.request for piece in pieces]].gather(1, owned // block_size).long()
    query_positions = (context_lens - queries + torch.arange(queries, device=device)).unsqueeze(2)
    hidden = keys.unsqueeze(1) > query_positions
    if window:
        hidden |= keys.unsqueeze(1) <= query_positions - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    rows = torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in pieces])
    return _Call(rows, blocks * block_size + owned % block_size, mask.unsqueeze(1))
