"""Attention over the paged KV cache, and writing to it. Each yields a trial for each number of rows.

The caches of several layers take turns, for a step reads each once.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import AttentionBatch, StepInputs
from onebase_server.bench.kernels.contenders import against_reference, contenders
from onebase_server.bench.kernels.trial import Trial, Work
from onebase_server.bench.kernels.workbench import DTYPE_BYTES, Workbench

CACHE_BLOCK = 16
"""Tokens of a block of the KV cache, as served by default."""

KvCaches = list[tuple[Tensor, Tensor]]
"""Keys and values [blocks, block, Hkv, D] that take turns, as those of the layers do."""


def write_kv_(bench: Workbench) -> Iterator[Trial]:
    """Keys and values of requests that decode, one token each."""
    for rows, caches, batch in _decoding(bench):
        k, v = (bench.random(rows, *caches[0][0].shape[2:]) for _ in range(2))
        yield Trial(
            *("write_kv_", "", rows),
            Work(bytes=2 * (k.nbytes + v.nbytes), flops=0),
            against_reference(bench, [partial(_write, k, v, *cache) for cache in caches]),
            [bench.step(rows, attention=batch)],
        )


def decode_attention(bench: Workbench) -> Iterator[Trial]:
    """Requests that decode: a token each, which sees the whole context."""
    for rows, caches, batch in _decoding(bench):
        yield _attention(bench, "decode", caches, batch, pairs=rows * bench.options.context)


def prefill_attention(bench: Workbench) -> Iterator[Trial]:
    """The last tokens of one prompt, as chunked prefill computes them."""
    pool = _cache_pool(bench, max(bench.options.context, *bench.options.rows))
    for rows in bench.options.rows:
        context = max(bench.options.context, rows)
        caches, batch = _paged(bench, pool, requests=1, queries=rows, context=context)
        yield _attention(bench, "prefill", caches, batch, pairs=rows * (context - rows) + rows * (rows + 1) // 2)


def _cache_pool(bench: Workbench, tokens: int) -> tuple[Tensor, Tensor]:
    """Memory for the keys and the values of as many caches as have to take turns, each for `tokens` at most."""
    config = bench.config
    blocks = -(-tokens // CACHE_BLOCK)
    size = 2 * blocks * CACHE_BLOCK * config.num_kv_heads * config.head_dim * DTYPE_BYTES
    total = blocks * bench.num_copies(size, per_step=config.num_layers)
    keys, values = (bench.random(total, CACHE_BLOCK, config.num_kv_heads, config.head_dim) for _ in range(2))
    return keys, values


def _paged(
    bench: Workbench, pool: tuple[Tensor, Tensor], *, requests: int, queries: int, context: int
) -> tuple[KvCaches, AttentionBatch]:
    """Caches cut from the pool, and requests of `queries` tokens each whose blocks lie scattered in them."""
    per_request = -(-context // CACHE_BLOCK)
    needed = requests * per_request
    caches = list(zip(*(torch.split(half, needed)[: len(half) // needed] for half in pool), strict=True))
    scattered = torch.randperm(needed, generator=torch.Generator().manual_seed(bench.options.seed))
    block_tables = scattered.view(requests, per_request)
    positions = torch.arange(context - queries, context)
    slots = block_tables[:, positions // CACHE_BLOCK] * CACHE_BLOCK + positions % CACHE_BLOCK
    batch = AttentionBatch(
        query_starts=tuple(range(0, requests * queries + 1, queries)),
        context_lens=(context,) * requests,
        block_tables=block_tables.int().to(bench.device),
        slot_mapping=slots.flatten().to(bench.device),
    )
    return caches, batch


def _decoding(bench: Workbench) -> Iterator[tuple[int, KvCaches, AttentionBatch]]:
    """For each number of rows: that many requests that decode."""
    context = bench.options.context
    pool = _cache_pool(bench, max(bench.options.rows) * (-(-context // CACHE_BLOCK) * CACHE_BLOCK))
    for rows in bench.options.rows:
        yield rows, *_paged(bench, pool, requests=rows, queries=1, context=context)


def _attention(bench: Workbench, variant: str, caches: KvCaches, batch: AttentionBatch, pairs: int) -> Trial:
    """`pairs` counts the queries times the keys that each sees."""
    config = bench.config
    rows, keys = len(batch.slot_mapping), sum(batch.context_lens)
    q = bench.random(rows, config.num_heads, config.head_dim)
    calls = [partial(_attend, q, *cache) for cache in caches]
    return Trial(
        *("paged_attention", variant, rows),
        Work(
            bytes=2 * keys * config.num_kv_heads * config.head_dim * DTYPE_BYTES + 2 * q.nbytes,
            flops=4 * pairs * config.num_heads * config.head_dim,
        ),
        contenders(dict.fromkeys(bench.rivals("reference", "bitsandbytes"), calls)),
        [bench.step(rows, attention=batch)],
    )


def _write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepInputs) -> None:
    kernels.write_kv_(k, v, k_cache, v_cache, step.attention)


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepInputs) -> Tensor:
    return kernels.paged_attention(q, k_cache, v_cache, step.attention, q.shape[2] ** -0.5)
