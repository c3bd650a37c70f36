"""The ops on the C++ library: addresses and sizes go over, nothing is computed here.

What the library does not carry (fp16, odd shapes, views) goes to the torch versions, so that every op takes whatever
the reference takes.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from onebase_kernels import reference, sdpa_attention
from onebase_kernels.batch import AttentionBatch, Segment
from onebase_kernels.cpu.library import DTYPES, CAttention, load_library
from onebase_kernels.cpu.nf4_packing import TiledNf4, can_pack, pack
from onebase_kernels.nf4 import Nf4Weight, PackedNf4

_library = load_library()

_LANES = 16


def pack_nf4(weights: Sequence[Nf4Weight]) -> PackedNf4:
    """As `reference.pack_nf4`, in tiles."""
    return pack(weights) if can_pack(weights) else reference.pack_nf4(weights)


def nf4_linear(x: Tensor, packed: PackedNf4) -> Tensor:
    """As `reference.nf4_linear`, fused: no weight is ever dequantised in memory."""
    if not isinstance(packed, TiledNf4):
        return reference.nf4_linear(x, packed)
    if x.dtype not in DTYPES:
        return nf4_linear(x.float(), packed).to(x.dtype)
    x = x.contiguous()
    y = torch.empty(x.shape[0], packed.out_features, dtype=x.dtype)
    _library.onebase_nf4_linear(packed.address, x.data_ptr(), x.shape[0], y.data_ptr(), DTYPES[x.dtype])
    return y


def add_lora_(
    y: Tensor, x: Tensor, arena: Tensor, table: Tensor, widths: Sequence[int], segments: Sequence[Segment]
) -> None:
    """As `reference.add_lora_`, all segments and slices in one call."""
    if y.dtype not in DTYPES or not _are_plain(y, x, arena, table):
        reference.add_lora_(y, x, arena, table, widths, segments)
        return
    _library.onebase_add_lora(
        y.data_ptr(),
        x.data_ptr(),
        arena.data_ptr(),
        table.data_ptr(),
        _int64s(tuple(widths)),
        len(widths),
        x.shape[1],
        y.shape[1],
        _segments(tuple(segments)),
        len(segments),
        DTYPES[y.dtype],
    )


def write_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """As `reference.write_kv_`."""
    for new, cache in ((k, k_cache), (v, v_cache)):
        if not _has_plain_tokens(new) or new.dtype != cache.dtype or not _are_plain(cache, slot_mapping):
            reference.write_kv_(k, v, k_cache, v_cache, slot_mapping)
            return
    for new, cache in ((k, k_cache), (v, v_cache)):
        size = new.element_size()
        _library.onebase_write_cache(
            new.data_ptr(),
            new.shape[0],
            new.stride(0) * size,
            new.shape[1] * new.shape[2] * size,
            slot_mapping.data_ptr(),
            cache.data_ptr(),
        )


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, window: int | None = None
) -> Tensor:
    """As `reference.paged_attention`."""
    is_carried = q.dtype in DTYPES and q.dtype == k_cache.dtype == v_cache.dtype
    if not is_carried or not _has_plain_tokens(q) or not _are_plain(k_cache, v_cache, batch.block_tables):
        return sdpa_attention.paged_attention(q, k_cache, v_cache, batch, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype)
    query_starts, context_lens = _int64s(batch.query_starts), _int64s(batch.context_lens)
    call = CAttention(
        q=q.data_ptr(),
        out=out.data_ptr(),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        q_stride=q.stride(0),
        query_starts=ctypes.addressof(query_starts),
        context_lens=ctypes.addressof(context_lens),
        block_tables=batch.block_tables.data_ptr(),
        num_requests=len(batch.context_lens),
        table_width=batch.block_tables.shape[1],
        block_size=k_cache.shape[1],
        heads=q.shape[1],
        kv_heads=k_cache.shape[2],
        head_size=q.shape[2],
        window=window or 0,
        scale=scale,
    )
    if _library.onebase_attention(ctypes.byref(call), DTYPES[q.dtype]):
        return out
    return sdpa_attention.paged_attention(q, k_cache, v_cache, batch, scale, window)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    if x.dtype not in DTYPES or x.dtype != weight.dtype:
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    _library.onebase_rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps, DTYPES[x.dtype]
    )
    return y


def apply_rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `reference.apply_rope_`."""
    if q.dtype not in DTYPES or not (_has_plain_tokens(q) and _has_plain_tokens(k) and _are_plain(cos, sin)):
        reference.apply_rope_(q, k, cos, sin)
        return
    for heads in (q, k):
        tokens, num_heads, head_size = heads.shape
        _library.onebase_rope(
            heads.data_ptr(),
            tokens,
            heads.stride(0),
            num_heads,
            head_size,
            cos.data_ptr(),
            sin.data_ptr(),
            DTYPES[heads.dtype],
        )


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.silu_mul`."""
    if gate_up.dtype not in DTYPES:
        return reference.silu_mul(gate_up)
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, size, dtype=gate_up.dtype)
    _library.onebase_silu_mul(gate_up.data_ptr(), y.data_ptr(), rows, size, DTYPES[gate_up.dtype])
    return y


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """As `reference.head_logits`; bf16 is not rounded once more on the way to fp32."""
    (vocab, size), plain = head.shape, hidden.is_contiguous() and head.is_contiguous()
    if plain and hidden.dtype == head.dtype == torch.bfloat16 and vocab % _LANES == 0 and size % (2 * _LANES) == 0:
        logits = torch.empty(hidden.shape[0], vocab, dtype=torch.float32)
        if _library.onebase_dense_linear(
            hidden.data_ptr(), hidden.shape[0], head.data_ptr(), vocab, size, logits.data_ptr()
        ):
            return logits
    return reference.head_logits(hidden, head)


def set_num_threads(count: int) -> None:
    """As `reference.set_num_threads`, for the library's threads and for torch's."""
    _library.onebase_set_threads(count)
    torch.set_num_threads(count)


def _are_plain(*tensors: Tensor) -> bool:
    """Whether memory is what the shape says: no gaps, no transposition."""
    return all(tensor.is_contiguous() for tensor in tensors)


def _has_plain_tokens(heads: Tensor) -> bool:
    """Whether each token's heads [H, D] lie without gaps, however far apart the tokens are."""
    return heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]


@lru_cache(maxsize=64)  # every layer of a step asks for the same few
def _int64s(values: tuple[int, ...]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(values))(*values)


@lru_cache(maxsize=4)
def _segments(segments: tuple[Segment, ...]) -> "ctypes.Array[ctypes.c_int64]":
    return _int64s(tuple(number for segment in segments for number in segment))
