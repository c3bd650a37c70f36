"""The side path of a projection group: y[rows of a segment] += (x Aᵀ) B by each segment's adapter, then its epilogue.

Two launches serve all segments and slices, whatever their ranks: shrink (x Aᵀ), then expand (· B). Both go by tiles,
that is a few tokens of one adapter, so that its numbers are read once for all of them. Reading is what this waits for,
so a shrink's inputs are shared out among programs; the sums of these splits are added in a fixed order by the expand,
without atomics, and the bits are always the same. Ranks are read on the device only: the grid depends on the number of
tiles alone. (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onebase_kernels import batch, int8_matrices
from onebase_kernels.batch import LoraBatch, Segment
from onebase_kernels.triton.step_cache import once_per_batch


class Tiling(NamedTuple):
    """How the work of a step is cut."""

    tokens: int
    """Of a tile, at most."""
    ranks: int
    """Taken at a time."""
    splits: int
    """Of the inputs among programs of the shrink."""
    outputs: int
    """Of a program of the expand."""


# A tile of 64 tokens would compile to Hopper's wgmma with an operand in registers, which ptxas before 13.3 may
# miscompile (triton issue 9433), and gain nothing.
_FEW_TOKENS = Tiling(tokens=16, ranks=16, splits=8, outputs=256)
_MANY_TOKENS = Tiling(tokens=32, ranks=32, splits=2, outputs=128)
DECODE_TOKENS = _FEW_TOKENS.tokens
"""Of a tile at most, where all requests decode."""

_RANK_PARTS = 4  # of an adapter's ranks among programs of the shrink, each of which takes every fourth block of them
_INPUT_BYTES = 512  # of a row, which a program of the shrink reads at a time

_FP32 = tl.constexpr("tf32x3")  # how tensor cores multiply fp32: in three products, which loses next to nothing
_TILE_COLUMNS = tl.constexpr(3)  # slot, first token, token after the last
_TABLE_COLUMNS = tl.constexpr(batch.TABLE_COLUMNS)  # offset, ranks of up to three slices, bits of their epilogues
_INT8_ZERO = tl.constexpr(int8_matrices.ZERO)
_LINE_BYTES = tl.constexpr(int8_matrices.LINE_BYTES)


@triton.jit
def _first_matrix(arena_ptr, start, total_rank, IS_INT8: tl.constexpr):
    """Where A lies: behind its scales and B's, if it has any."""
    if IS_INT8:
        scale_bytes = (8 * total_rank + _LINE_BYTES - 1) // _LINE_BYTES * _LINE_BYTES
        first = (arena_ptr + start).to(tl.pointer_type(tl.uint8)) + scale_bytes
    else:
        first = arena_ptr + start
    return first


@triton.jit
def _load_matrix(pointers, mask, DTYPE: tl.constexpr, IS_INT8: tl.constexpr):
    """A tile of A or B as products take it, without scales; 0 where it is masked."""
    if IS_INT8:
        tile = (tl.load(pointers, mask=mask, other=_INT8_ZERO).to(tl.float32) - _INT8_ZERO).to(DTYPE)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit(do_not_specialize=["num_tokens", "plane_stride"])
def shrink_kernel(
    x_ptr,
    arena_ptr,
    table_ptr,
    tiles_ptr,
    planes_ptr,
    num_tokens,
    plane_stride,
    IN_FEATURES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_INT8: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK_PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """`planes[split, token, rank] = Σ x[token, i] · A[rank, i]` over a split's inputs i; grid (tile, split, part)."""
    PER_SPLIT: tl.constexpr = (IN_FEATURES + SPLITS * INPUTS - 1) // (SPLITS * INPUTS) * INPUTS
    tile_ptr, split = tiles_ptr + tl.program_id(0) * _TILE_COLUMNS, tl.program_id(1)
    slot = tl.load(tile_ptr)
    if slot < 0:
        return
    tokens = tl.load(tile_ptr + 1) + tl.arange(0, TOKENS)
    has_token = (tokens < tl.load(tile_ptr + 2))[:, None]
    row_ptr = table_ptr + slot * _TABLE_COLUMNS
    total_rank = (tl.load(row_ptr + 1) + tl.load(row_ptr + 2) + tl.load(row_ptr + 3)).to(tl.int32)
    start = tl.multiple_of(tl.load(row_ptr), ALIGNMENT)
    a_ptr = _first_matrix(arena_ptr, start, total_rank, IS_INT8)
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * IN_FEATURES
    plane_rows = planes_ptr + (split.to(tl.int64) * num_tokens + tokens[:, None]) * plane_stride
    for first_rank in range(tl.program_id(2) * RANKS, total_rank, RANK_PARTS * RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        has_rank = ranks < total_rank
        a_rows = a_ptr + ranks[:, None] * IN_FEATURES
        sums = tl.zeros((TOKENS, RANKS), tl.float32)
        for first_input in range(split * PER_SPLIT, min((split + 1) * PER_SPLIT, IN_FEATURES), INPUTS):
            inputs = (first_input + tl.arange(0, INPUTS))[None, :]
            x = tl.load(x_rows + inputs, mask=has_token & (inputs < IN_FEATURES), other=0.0)
            a = _load_matrix(a_rows + inputs, has_rank[:, None] & (inputs < IN_FEATURES), x.dtype, IS_INT8)
            sums = tl.dot(x, tl.trans(a), sums, input_precision=_FP32)
        if IS_INT8:
            scale_ptr = (arena_ptr + start).to(tl.pointer_type(tl.float32)) + ranks
            scales = tl.load(scale_ptr, mask=has_rank, other=0.0) * tl.load(
                scale_ptr + total_rank, mask=has_rank, other=0.0
            )
            sums *= scales[None, :]
        tl.store(plane_rows + ranks[None, :], sums, mask=has_token & has_rank[None, :])


@triton.jit
def _of_slice(index, first, second, third):
    return tl.where(index == 2, third, tl.where(index == 1, second, first))


@triton.jit(do_not_specialize=["num_tokens", "plane_stride"])
def expand_kernel(
    y_ptr,
    arena_ptr,
    table_ptr,
    tiles_ptr,
    planes_ptr,
    num_tokens,
    plane_stride,
    IN_FEATURES: tl.constexpr,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_INT8: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """`y[token, slice] += (Σ planes[·, token, slice's ranks]) · B`, then the slice's epilogue.

    Grid: (tile, block of the outputs of a slice).
    """
    BLOCKS_0: tl.constexpr = (WIDTH_0 + OUTPUTS - 1) // OUTPUTS
    BLOCKS_1: tl.constexpr = (WIDTH_1 + OUTPUTS - 1) // OUTPUTS
    tile_ptr, block = tiles_ptr + tl.program_id(0) * _TILE_COLUMNS, tl.program_id(1)
    slot = tl.load(tile_ptr)
    if slot < 0:
        return
    row_ptr = table_ptr + slot * _TABLE_COLUMNS
    rank_0, rank_1, rank_2 = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    # The slice that the block is of, and what lies before it: ranks in the planes, numbers in B, columns in y.
    index = (block >= BLOCKS_0).to(tl.int32) + (block >= BLOCKS_0 + BLOCKS_1).to(tl.int32)
    rank = _of_slice(index, rank_0, rank_1, rank_2).to(tl.int32)
    epilogues = tl.load(row_ptr + 4)
    has_epilogue = (epilogues >> index) & 1
    if (rank == 0) & (has_epilogue == 0):
        return
    width = _of_slice(index, WIDTH_0, WIDTH_1, WIDTH_2)
    first_rank = _of_slice(index, 0, rank_0, rank_0 + rank_1)
    first_number = _of_slice(index, 0, rank_0 * WIDTH_0, rank_0 * WIDTH_0 + rank_1 * WIDTH_1)
    first_column = _of_slice(index, 0, WIDTH_0, WIDTH_0 + WIDTH_1)
    total_rank = rank_0 + rank_1 + rank_2
    start = tl.multiple_of(tl.load(row_ptr), ALIGNMENT)
    b_ptr = _first_matrix(arena_ptr, start, total_rank, IS_INT8) + total_rank * IN_FEATURES
    in_first, in_second = (epilogues & 1) * WIDTH_0, ((epilogues >> 1) & 1) * WIDTH_1
    gain_ptr = (b_ptr + rank_0 * WIDTH_0 + rank_1 * WIDTH_1 + rank_2 * WIDTH_2).to(arena_ptr.dtype)
    gain_ptr += 2 * _of_slice(index, 0, in_first, in_first + in_second)
    b_ptr += first_number

    tokens = tl.load(tile_ptr + 1) + tl.arange(0, TOKENS)
    has_token = (tokens < tl.load(tile_ptr + 2))[:, None]
    columns = ((block - _of_slice(index, 0, BLOCKS_0, BLOCKS_0 + BLOCKS_1)) * OUTPUTS + tl.arange(0, OUTPUTS))[None, :]
    has_column = columns < width
    plane_rows = planes_ptr + tokens.to(tl.int64)[:, None] * plane_stride + first_rank
    y_rows = y_ptr + tokens.to(tl.int64)[:, None] * (WIDTH_0 + WIDTH_1 + WIDTH_2) + first_column
    sums = tl.load(y_rows + columns, mask=has_token & has_column, other=0.0).to(tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        has_rank = ranks < rank
        shrunk = tl.zeros((TOKENS, RANKS), tl.float32)
        for split in tl.static_range(SPLITS):
            plane = plane_rows + split * num_tokens.to(tl.int64) * plane_stride
            shrunk += tl.load(plane + ranks[None, :], mask=has_token & has_rank[None, :], other=0.0)
        b_tile = b_ptr + ranks[:, None] * width + columns
        b = _load_matrix(b_tile, has_rank[:, None] & has_column, y_ptr.dtype.element_ty, IS_INT8)
        sums = tl.dot(shrunk.to(b.dtype), b, sums, input_precision=_FP32)
    if has_epilogue:
        gain = tl.load(gain_ptr + columns, mask=has_column, other=0.0).to(tl.float32)
        sums += sums * gain + tl.load(gain_ptr + width + columns, mask=has_column, other=0.0).to(tl.float32)
    tl.store(y_rows + columns, sums, mask=has_token & has_column)


@dataclass(frozen=True, eq=False)
class Tiles:
    """A step's tiles."""

    table: Tensor
    """int32 [tiles, 3]: slot, first token, token after the last. A tile of slot -1 is skipped."""
    tiling: Tiling
    max_rank: int
    """The most ranks that any of the adapters has at one place, in all slices together."""


def start(x: Tensor, lora: LoraBatch, place: int) -> Tensor | None:
    """Have the shrink run beside what comes next, in a CUDA graph: elsewhere a fork costs more than it saves.

    The planes are for `add_lora_`, which waits for them; None if nothing has begun.
    """
    tiles = plan(lora)
    if tiles is None or not x.is_cuda:
        return None
    stream = _side_stream(x.device)  # made by a call before any capture, in which nothing should be set up
    if not torch.cuda.is_current_stream_capturing():
        return None
    planes = _planes(x, tiles)  # of this stream, so that nobody else gets their memory before they are used
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _shrink(planes, x, tiles, lora, place)
    return planes


def add_lora_(
    y: Tensor, x: Tensor, lora: LoraBatch, place: int, widths: Sequence[int], started: Tensor | None = None
) -> None:
    """As `reference.add_lora_`, for matrices without gaps."""
    tiles = plan(lora)
    if tiles is None:
        return
    if started is None:
        planes = _planes(x, tiles)
        _shrink(planes, x, tiles, lora, place)
    else:
        planes = started
        torch.cuda.current_stream().wait_stream(_side_stream(x.device))
    tokens, ranks, splits, outputs = tiles.tiling
    blocks = sum(triton.cdiv(width, outputs) for width in widths)
    three_widths = (*widths, 0, 0)[:3]
    expand_kernel[(len(tiles.table), blocks)](
        *(y, lora.arena, lora.table[place], tiles.table, planes, *planes.shape[1:], x.shape[1], *three_widths),
        *(lora.alignment, lora.is_int8, splits, tokens, ranks, outputs),
        num_stages=1,
    )


def _planes(x: Tensor, tiles: Tiles) -> Tensor:
    """Memory for x Aᵀ: [splits, T, ranks], whose sum it is."""
    max_rank = triton.cdiv(tiles.max_rank, 16) * 16
    return torch.empty(tiles.tiling.splits, x.shape[0], max_rank, dtype=torch.float32, device=x.device)


def _shrink(planes: Tensor, x: Tensor, tiles: Tiles, lora: LoraBatch, place: int) -> None:
    tokens, ranks, splits, _ = tiles.tiling
    shrink_kernel[(len(tiles.table), splits, _RANK_PARTS)](
        *(x, lora.arena, lora.table[place], tiles.table, planes, *planes.shape[1:], x.shape[1]),
        *(lora.alignment, lora.is_int8, splits, _RANK_PARTS, tokens, ranks, _INPUT_BYTES // x.element_size()),
    )


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(frozen=True, eq=False)
class DecodeLoraBatch(LoraBatch):
    """The adapters of requests that all decode, as a captured CUDA graph has them: only known to the device."""

    tiles: Tensor = field(kw_only=True)
    """int32 [tiles, 3], as `Tiles.table`, of `DECODE_TOKENS` each at most; those of slot -1 only fill up."""


@once_per_batch
def plan(lora: LoraBatch) -> Tiles | None:
    """The tiles of a step; None if it has no adapters."""
    if isinstance(lora, DecodeLoraBatch):
        return Tiles(lora.tiles, _FEW_TOKENS, _max_rank(lora))
    if not lora.segments:
        return None
    longest = max(segment.stop - segment.start for segment in lora.segments)
    tiling = _MANY_TOKENS if longest > _FEW_TOKENS.tokens else _FEW_TOKENS
    table = torch.tensor(cut(lora.segments, tiling.tokens), dtype=torch.int32, device=lora.table.device)
    return Tiles(table, tiling, _max_rank(lora))


def cut(segments: Sequence[Segment], tokens: int) -> list[Segment]:
    """Segments of `tokens` at most."""
    return [
        Segment(slot, first, min(first + tokens, stop))
        for slot, start, stop in segments
        for first in range(start, stop, tokens)
    ]


def _max_rank(lora: LoraBatch) -> int:
    return int(lora.table[..., 1:4].sum(dim=-1).max()) if lora.max_rank is None else lora.max_rank
