"""The product with NF4 weights: codes go from memory to the tensor cores' registers, never through shared memory.

The weights are the left operand (the product is transposed: W xᵀ), in the order of `nf4_packing`. One dot covers one
block of 64 inputs, whose scale is then applied to the sums. While some blocks are multiplied, the codes of the next
are on their way. Programs share out the inputs in a fixed number of splits, whose partial sums are added in a fixed
order by a second launch: nothing is atomic, the bits are always the same.

The dots have an operand in registers; ptxas before 13.3 may miscompile those if they are pipelined (triton issue 9433).
So loops have one stage, and each dot is used in the iteration that makes it; tests/gpu holds the result exact.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onebase_kernels.blockwise import BLOCK_SIZE, NESTED_BLOCK_SIZE
from onebase_kernels.triton.nf4_decode import (
    CODEBOOKS,
    TABLE_COPIES,
    decode_with_loads,
    decode_with_permutations,
    decoding,
    load_tables,
)
from onebase_kernels.triton.nf4_packing import TILE_ROWS, FragmentNf4
from onebase_kernels.triton.plans import MAX_FUSED_ROWS, Plan, plan_for

_BLOCK = tl.constexpr(BLOCK_SIZE)
_NESTED_BLOCK = tl.constexpr(NESTED_BLOCK_SIZE)
_TILE_ROWS = tl.constexpr(TILE_ROWS)
_GROUP_WORDS = tl.constexpr(BLOCK_SIZE // 4)  # of the two outputs, eight rows apart, whose codes lie together
_TILE_WORDS = tl.constexpr(TILE_ROWS * BLOCK_SIZE // 8)
_COPIES = tl.constexpr(TABLE_COPIES)

_CHUNK_BYTES = 28 << 20  # of dequantised weights; they stay in the L2 cache (50 MB and more) until they are used
_BLOCKS_TOGETHER = 4  # dequantised by one program
_SUM_BLOCK = 512


@triton.jit
def _as_operand(numbers, BLOCK_N: tl.constexpr):
    """The decoded numbers of words [BLOCK_N / 2, 16], in the order of `nf4_packing`, as a matrix [BLOCK_N, 64]."""
    low = tl.join(tl.join(numbers[0], numbers[2]), tl.join(numbers[1], numbers[3]))
    high = tl.join(tl.join(numbers[4], numbers[6]), tl.join(numbers[5], numbers[7]))
    fragment = tl.join(low, high).reshape(BLOCK_N // 16, 8, 4, 4, 2, 2, 2)  # 16 rows, g, q, 16 inputs, eight, odd, half
    return fragment.trans(0, 6, 1, 3, 4, 2, 5).reshape(BLOCK_N, 64)


@triton.jit
def _code_offsets(rows, BLOCKS: tl.constexpr):
    """Offsets [rows, 16] of the words of a block's codes, for pairs of outputs `rows`, counted over the whole group."""
    tile, row = rows // (_TILE_ROWS // 2), rows % (_TILE_ROWS // 2)
    return (tile * (BLOCKS * _TILE_WORDS) + row * _GROUP_WORDS)[:, None] + tl.arange(0, _GROUP_WORDS)[None, :]


@triton.jit
def _load_words(codes_ptr, count: tl.constexpr):
    """The codes of so many blocks, in a tuple."""
    words = ()
    for block in tl.static_range(count):
        # Triton knows neither unpacking nor annotations of tuples.
        words = words + (tl.load(codes_ptr + block * _TILE_WORDS),)  # type: ignore[assignment]  # noqa: RUF005
    return words


@triton.jit
def _load_inputs(x_ptr, is_row, count: tl.constexpr):
    """x for so many blocks, in a tuple; zero beyond its rows."""
    inputs = ()
    for block in tl.static_range(count):
        x = tl.load(x_ptr + block * _BLOCK, mask=is_row, other=0.0)
        inputs = inputs + (x,)  # type: ignore[assignment]  # noqa: RUF005 - as above
    return inputs


@triton.jit
def _load_scales(scales_ptr, map_ptr, nested, offsets, NESTED: tl.constexpr):
    """A block's scales in fp32, decoded if they are 8-bit codes."""
    scales = tl.load(scales_ptr)
    if NESTED:
        scales = tl.load(map_ptr + scales.to(tl.int32)) * nested + offsets
    return scales


@triton.jit(do_not_specialize=["num_rows"])
def fused_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    nested_ptr,
    offsets_ptr,
    map_ptr,
    tables_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    INPUT_SCALE: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PERMUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A tile of y, out [M, N]; or its sums over one split of the inputs, not scaled yet, out fp32 [SPLITS, M, N]."""
    BLOCKS: tl.constexpr = K // _BLOCK
    SPLIT_BLOCKS: tl.constexpr = BLOCKS // SPLITS
    split = tl.program_id(1)
    first = split * SPLIT_BLOCKS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    pairs = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    codes_ptr += _code_offsets(pairs, BLOCKS) + first * _TILE_WORDS
    scales_ptr += n // _TILE_ROWS * (BLOCKS * _TILE_ROWS) + n % _TILE_ROWS + first * _TILE_ROWS
    x_ptr += m[None, :].to(tl.int64) * K + tl.arange(0, _BLOCK)[:, None] + first * _BLOCK
    is_row = m[None, :] < num_rows
    tables = load_tables(tables_ptr, pairs, _COPIES) if PERMUTE else ()
    nested = tl.zeros((BLOCK_N,), tl.float32)
    offsets = tl.load(offsets_ptr + n // _TILE_ROWS)

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    ahead = _load_words(codes_ptr, UNROLL)
    for i in tl.range(0, SPLIT_BLOCKS, UNROLL, num_stages=1):
        words = ahead
        # In the last iteration the same again, which costs less than to ask whether there are more.
        ahead = _load_words(codes_ptr + tl.minimum(i + UNROLL, SPLIT_BLOCKS - UNROLL) * _TILE_WORDS, UNROLL)
        inputs = _load_inputs(x_ptr + i * _BLOCK, is_row, UNROLL)
        if NESTED:
            nested = tl.load(nested_ptr + (n * BLOCKS + first + i) // _NESTED_BLOCK)
        for u in tl.static_range(UNROLL):
            scales = _load_scales(scales_ptr + (i + u) * _TILE_ROWS, map_ptr, nested, offsets, NESTED)
            if PERMUTE:
                lifted = (inputs[u] * INPUT_SCALE).to(inputs[u].dtype)
                numbers = decode_with_permutations(words[u], tables, x_ptr)
            else:  # Triton's interpreter takes bfloat16 for whole numbers in a dot
                lifted = inputs[u].to(tl.float32)
                numbers = decode_with_loads(words[u], tables_ptr)
            sums += tl.dot(_as_operand(numbers, BLOCK_N), lifted) * scales[:, None]

    if SPLITS == 1:
        sums *= OUTPUT_SCALE
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    out_ptr += (split * num_rows + m[None, :].to(tl.int64)) * N + n[:, None]
    tl.store(out_ptr, sums.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def sum_planes_kernel(
    planes_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    N: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [M, N] = the scaled sum of planes [SPLITS, M, N], first to last, and the bias [N]."""
    size = num_rows.to(tl.int64) * N
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < size
    total = tl.load(planes_ptr + at, mask=is_there)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(planes_ptr + split * size + at, mask=is_there)
    total *= OUTPUT_SCALE
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=is_there).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["first_tile"])
def dequantize_kernel(
    codes_ptr,
    scales_ptr,
    nested_ptr,
    offsets_ptr,
    map_ptr,
    tables_ptr,
    out_ptr,
    first_tile,
    K: tl.constexpr,
    NESTED: tl.constexpr,
    PERMUTE: tl.constexpr,
    INPUT_SCALE: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """COUNT blocks of a tile's outputs, [64, 64] each, to out [outputs of the tiles from `first_tile` on, K]."""
    BLOCKS: tl.constexpr = K // _BLOCK
    tile = first_tile + tl.program_id(1)
    first = tl.program_id(0) * COUNT
    row = tl.arange(0, _TILE_ROWS)
    pair = tl.arange(0, _TILE_ROWS // 2)
    codes_ptr += (tile.to(tl.int64) * BLOCKS + first) * _TILE_WORDS
    scales_ptr += (tile * BLOCKS + first) * _TILE_ROWS + row
    out_ptr += (tl.program_id(1).to(tl.int64) * _TILE_ROWS + row)[:, None] * K + tl.arange(0, _BLOCK)[None, :]
    words = _load_words(codes_ptr + _code_offsets(pair, BLOCKS), COUNT)
    tables = load_tables(tables_ptr, pair, _COPIES) if PERMUTE else ()
    nested, offset = 0.0, 0.0
    if NESTED:
        offset = tl.load(offsets_ptr + tile)
        nested = tl.load(nested_ptr + ((tile * _TILE_ROWS + row) * BLOCKS + first) // _NESTED_BLOCK)
    for i in tl.static_range(COUNT):
        scales = _load_scales(scales_ptr + i * _TILE_ROWS, map_ptr, nested, offset, NESTED)
        # Two steps, for the scales alone would be too large for fp32.
        if PERMUTE:
            operand = _as_operand(decode_with_permutations(words[i], tables, out_ptr), _TILE_ROWS)
            lifted = (operand * INPUT_SCALE).to(tl.float32)
        else:
            lifted = _as_operand(decode_with_loads(words[i], tables_ptr), _TILE_ROWS) * INPUT_SCALE
        weights = lifted * (scales * OUTPUT_SCALE)[:, None]
        tl.store(out_ptr + (first + i) * _BLOCK, weights.to(out_ptr.dtype.element_ty))


def nf4_linear(x: Tensor, packed: FragmentNf4, bias: Tensor | None = None) -> Tensor:
    """As `reference.quantized_linear`: up to 256 rows fused, more rows and fp32 through dequantised weights."""
    x = x.contiguous()
    num_rows = x.shape[0]
    if x.dtype not in CODEBOOKS or num_rows > MAX_FUSED_ROWS:
        return chunked_linear(x, packed, bias)
    if num_rows == 0:
        return x.new_empty(0, packed.out_features)
    return fused_linear(x, packed, bias, plan_for(num_rows, packed.out_features, packed.in_features, x.device))


def fused_linear(x: Tensor, packed: FragmentNf4, bias: Tensor | None, plan: Plan) -> Tensor:
    """`nf4_linear` of x [M, K], contiguous bf16 or fp16, cut as `plan` says."""
    (num_rows, k), n = x.shape, packed.out_features
    tables, constants = decoding(x.dtype, x.device)
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    has_planes = plan.splits > 1
    planes = torch.empty(plan.splits, num_rows, n, device=x.device) if has_planes else y
    grid = (n // plan.block_n, plan.splits, triton.cdiv(num_rows, plan.block_m))
    fused_kernel[grid](
        x,
        *_operands(packed),
        tables,
        bias,
        planes,
        num_rows,
        N=n,
        K=k,
        **constants,
        NESTED=packed.nested is not None,
        HAS_BIAS=bias is not None and not has_planes,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        SPLITS=plan.splits,
        UNROLL=plan.unroll,
        num_warps=plan.num_warps,
        num_stages=1,
    )
    if has_planes:
        sum_planes_kernel[(triton.cdiv(y.numel(), _SUM_BLOCK),)](
            planes,
            bias,
            y,
            num_rows,
            N=n,
            OUTPUT_SCALE=constants["OUTPUT_SCALE"],
            HAS_BIAS=bias is not None,
            SPLITS=plan.splits,
            BLOCK=_SUM_BLOCK,
        )
    return y


def chunked_linear(x: Tensor, packed: FragmentNf4, bias: Tensor | None) -> Tensor:
    """`nf4_linear` for any number of rows: a chunk of outputs is dequantised, multiplied by cuBLAS, and forgotten."""
    y = torch.empty(x.shape[0], packed.out_features, dtype=x.dtype, device=x.device)
    tiles = packed.codes.shape[0]
    chunk = max(1, _CHUNK_BYTES // (TILE_ROWS * packed.in_features * x.element_size()))
    for tile in range(0, tiles, chunk):
        columns = slice(tile * TILE_ROWS, min(tile + chunk, tiles) * TILE_ROWS)
        weights = dequantize(packed, tile, min(chunk, tiles - tile), x.dtype)
        if bias is None:
            torch.mm(x, weights.T, out=y[:, columns])
        else:
            torch.addmm(bias[columns], x, weights.T, out=y[:, columns])
    return y


def dequantize(packed: FragmentNf4, first_tile: int, num_tiles: int, dtype: torch.dtype) -> Tensor:
    """The weights of some tiles of outputs, [64 · num_tiles, K]: fp32 products, rounded once to `dtype`.

    In fp32 they are NF4's; in bf16 and fp16 those that `fused_linear` multiplies with.
    """
    k = packed.in_features
    tables, constants = decoding(dtype, packed.codes.device)
    out = torch.empty(num_tiles * TILE_ROWS, k, dtype=dtype, device=packed.codes.device)
    blocks = k // BLOCK_SIZE
    count = 1 if blocks % _BLOCKS_TOGETHER else _BLOCKS_TOGETHER
    dequantize_kernel[(blocks // count, num_tiles)](
        *_operands(packed),
        tables,
        out,
        first_tile,
        K=k,
        NESTED=packed.nested is not None,
        COUNT=count,
        **constants,
        num_warps=4,
    )
    return out


def _operands(packed: FragmentNf4) -> tuple[Any, ...]:
    """What both kernels read of the weights, in the order of their parameters."""
    return packed.codes, packed.scales, packed.nested, packed.offsets, packed.quant_map
