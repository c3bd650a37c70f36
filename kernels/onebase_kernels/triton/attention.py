"""Attention over the paged KV cache: decode steps and chunks of prefill, any mix of them.

One kernel serves both. A program has a tile, that is some queries of a request with all query heads of one KV head, so
that each key and value is read once for all of them, and one split of the keys that they see. The splits' results are
joined by a second launch, in a fixed order (Flash-Decoding; the softmax is FlashAttention's, arXiv 2205.14135). How the
keys are split depends on the tile alone, never on what else is in the step. Scores and softmax are fp32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from onebase_kernels.batch import AttentionBatch
from onebase_kernels.triton.step_cache import once_per_batch

_PREFILL_ROWS = 64  # of a tile: queries times query heads of a KV head
_MAX_SPLITS = 32
_DECODE_SPLIT, _PREFILL_SPLIT = 256, 2048  # keys, fewer than which are not worth a program of their own
_KEY_BYTES = 1 << 14  # of keys, and as many of values, taken at a time
_LOG2_E = 1.4426950408889634

_FP32 = tl.constexpr("tf32x3")  # how tensor cores multiply fp32: in three products, which loses next to nothing
_TILE_COLUMNS = tl.constexpr(4)  # request, its first query's row, number of queries, the first one's position


@triton.jit
def _keys_of(tile_ptr, WINDOW: tl.constexpr, KEYS: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """The first key that a tile's queries see, the one after the last, and how many make a split."""
    num_queries, position = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    first_key = tl.maximum(position - WINDOW + 1, 0) if WINDOW else 0
    last_key = position + num_queries
    per_split = tl.cdiv(last_key - first_key, MAX_SPLITS * KEYS) * KEYS
    return first_key, last_key, tl.maximum(per_split, MIN_SPLIT)


@triton.jit(do_not_specialize=["table_width", "num_splits"])
def attend_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    tiles_ptr,
    out_ptr,
    sums_ptr,
    stats_ptr,
    scale,
    cap,
    table_width,
    num_splits,
    Q_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """Grid (tile, KV head, split); row r of a tile is its query r / GROUP under the KV head's query head r % GROUP.

    `scale` is for scores that are exponents of two; if IS_CAPPED, for those that `cap` multiplies the tanh of. Unless
    IS_SPLIT, the result goes to `out`; else the weighted sum of the values goes to `sums` [tile, KV head, row, split,
    HEAD_DIM], the greatest score and the sum of the weights to `stats` [tile, KV head, row, split, 2].
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_ptr = tiles_ptr + tile * _TILE_COLUMNS
    first_key, last_key, per_split = _keys_of(tile_ptr, WINDOW, KEYS, MIN_SPLIT, MAX_SPLITS)
    first_key += split * per_split
    last_key = tl.minimum(last_key, first_key + per_split)
    if first_key >= last_key:
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    has_row = (rows < QUERIES * GROUP) & (queries < tl.load(tile_ptr + 2))
    has_dim = (dims < HEAD_DIM)[None, :]
    positions = tl.load(tile_ptr + 3) + queries
    tokens = (tl.load(tile_ptr + 1) + queries).to(tl.int64)
    q = tl.load(
        q_ptr + (tokens * Q_STRIDE + heads * HEAD_DIM)[:, None] + dims[None, :],
        mask=has_row[:, None] & has_dim,
        other=0.0,
    )
    table_ptr = block_tables_ptr + tl.load(tile_ptr).to(tl.int64) * table_width

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIMS), tl.float32)
    for start in range(first_key, last_key, KEYS):
        keys = start + tl.arange(0, KEYS)
        has_key = keys < last_key
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=has_key, other=0).to(tl.int64)
        cache_rows = ((blocks * BLOCK_SIZE + keys % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        k = tl.load(k_cache_ptr + cache_rows[:, None] + dims[None, :], mask=has_key[:, None] & has_dim, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=_FP32) * scale
        if IS_CAPPED:
            scores = (2.0 * tl.sigmoid(2.0 * scores) - 1.0) * cap  # the first factor is tanh
        is_seen = has_key[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW:
            is_seen &= keys[None, :] > positions[:, None] - WINDOW
        scores = tl.where(is_seen, scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1))
        origin = tl.where(new_most == float("-inf"), 0.0, new_most)  # a row may have seen no key yet
        weights = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(most - origin)
        most = new_most
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_cache_ptr + cache_rows[:, None] + dims[None, :], mask=has_key[:, None] & has_dim, other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=_FP32)

    if IS_SPLIT:
        tile_row = (tile.to(tl.int64) * KV_HEADS + kv_head) * (QUERIES * GROUP) + rows
        at = tile_row * num_splits + split
        tl.store(sums_ptr + at[:, None] * HEAD_DIM + dims[None, :], sums, mask=has_row[:, None] & has_dim)
        tl.store(stats_ptr + 2 * at, most, mask=has_row)
        tl.store(stats_ptr + 2 * at + 1, total, mask=has_row)
    else:
        at = (tokens * (KV_HEADS * GROUP) + heads) * HEAD_DIM
        tl.store(out_ptr + at[:, None] + dims[None, :], sums / total[:, None], mask=has_row[:, None] & has_dim)


@triton.jit(do_not_specialize=["num_splits"])
def join_kernel(
    tiles_ptr,
    out_ptr,
    sums_ptr,
    stats_ptr,
    num_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid (tile, KV head, row): the splits of a row of a tile, weighed against each other."""
    tile, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_ptr = tiles_ptr + tile * _TILE_COLUMNS
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    if query >= tl.load(tile_ptr + 2):
        return
    first_key, last_key, per_split = _keys_of(tile_ptr, WINDOW, KEYS, MIN_SPLIT, MAX_SPLITS)
    splits, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, DIMS)
    has_split, has_dim = splits * per_split < last_key - first_key, dims < HEAD_DIM
    at = ((tile.to(tl.int64) * KV_HEADS + kv_head) * (QUERIES * GROUP) + row) * num_splits + splits
    most = tl.load(stats_ptr + 2 * at, mask=has_split, other=float("-inf"))
    weights = tl.exp2(most - tl.max(most, axis=0))
    total = tl.sum(weights * tl.load(stats_ptr + 2 * at + 1, mask=has_split, other=0.0), axis=0)
    sums = tl.load(
        sums_ptr + at[:, None] * HEAD_DIM + dims[None, :], mask=has_split[:, None] & has_dim[None, :], other=0.0
    )
    token = (tl.load(tile_ptr + 1) + query).to(tl.int64)
    out = tl.sum(sums * weights[:, None], axis=0) / total
    tl.store(out_ptr + (token * (KV_HEADS * GROUP) + head) * HEAD_DIM + dims, out, mask=has_dim)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles that one launch takes."""

    table: Tensor
    """int32 [tiles, 4]: request, row of the first query in the step, number of queries, position of the first.

    A tile without queries is skipped.
    """
    queries: int
    """The most that a tile has."""
    min_split: int
    """Keys."""
    most_keys: int
    """That a tile sees, of whatever position it may be given."""

    @property
    def num_splits(self) -> int:
        """Of the tile that has the most."""
        return min(_MAX_SPLITS, triton.cdiv(self.most_keys, self.min_split))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `reference.paged_attention`; caches without gaps, and q [T, H, D] whose tokens may lie apart."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for tiles in plan(batch, q.shape[1] // k_cache.shape[2], window):
        _attend(tiles, out, q, k_cache, v_cache, batch.block_tables, scale, window, softcap)
    return out


def _attend(
    tiles: Tiles,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """The tiles' rows of `paged_attention`, written to out."""
    _, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    num_tiles, num_splits, tile_rows = len(tiles.table), tiles.num_splits, tiles.queries * group
    sums = stats = out
    if num_splits > 1:
        sums = out.new_empty(num_tiles, kv_heads, tile_rows, num_splits, head_dim, dtype=torch.float32)
        stats = out.new_empty(num_tiles, kv_heads, tile_rows, num_splits, 2, dtype=torch.float32)
    rows, dims = (max(16, triton.next_power_of_2(number)) for number in (tile_rows, head_dim))
    keys = max(16, min(64, _KEY_BYTES // (dims * q.element_size())))
    cut = (window or 0, tiles.min_split, _MAX_SPLITS, tiles.queries)
    attend_kernel[(num_tiles, kv_heads, num_splits)](
        *(q, k_cache, v_cache, block_tables, tiles.table, out, sums, stats),
        *(scale / softcap if softcap else scale * _LOG2_E, (softcap or 0.0) * _LOG2_E),
        *(block_tables.shape[1], num_splits),
        *(
            q.stride(0),
            kv_heads,
            group,
            head_dim,
            block_size,
            *cut,
            rows,
            dims,
            keys,
            num_splits > 1,
            softcap is not None,
        ),
        num_stages=1 if rows >= 64 else 3,
    )
    if num_splits > 1:
        join_kernel[(num_tiles, kv_heads, tile_rows)](
            *(tiles.table, out, sums, stats, num_splits, kv_heads, group, head_dim, *cut, dims, keys)
        )


@dataclass(frozen=True, eq=False)
class DecodeBatch(AttentionBatch):
    """Requests that all decode, as a captured CUDA graph has them: who they are is only known to the device.

    `context_lens` says how long a context may become at most.
    """

    tiles: Tensor
    """int32 [S, 4], as `Tiles.table`: one for each request, or none where the step is only filled up."""


@once_per_batch
def plan(batch: AttentionBatch, group: int, window: int | None) -> tuple[Tiles, ...]:
    """A batch's tiles for `group` query heads to a KV head: those of the requests that decode, then prefill's."""
    if isinstance(batch, DecodeBatch):
        return (Tiles(batch.tiles, 1, _DECODE_SPLIT, _visible(max(batch.context_lens), 1, window)),)
    decode, prefill = [], []
    queries = max(1, _PREFILL_ROWS // group)
    for request, (context_len, query_len) in enumerate(zip(batch.context_lens, batch.query_lens, strict=True)):
        start, position = batch.query_starts[request], context_len - query_len
        if query_len == 1:
            decode.append((request, start, 1, position))
        else:
            prefill += [
                (request, start + first, min(queries, query_len - first), position + first)
                for first in range(0, query_len, queries)
            ]
    prefill.sort(key=lambda tile: -tile[3])  # the longest first, lest one of them is the last to start
    kinds = (decode, 1, _DECODE_SPLIT), (prefill, queries, _PREFILL_SPLIT)
    return tuple(_tiles(rows, most, min_split, window, batch) for rows, most, min_split in kinds if rows)


def _tiles(
    rows: list[tuple[int, int, int, int]], queries: int, min_split: int, window: int | None, batch: AttentionBatch
) -> Tiles:
    most_keys = _visible(max(position + count for _, _, count, position in rows), queries, window)
    table = torch.tensor(rows, dtype=torch.int32, device=batch.block_tables.device)
    return Tiles(table, queries, min_split, most_keys)


def _visible(keys: int, queries: int, window: int | None) -> int:
    """How many of so many keys a tile of queries sees."""
    return min(keys, window + queries - 1) if window else keys
