"""The small ops between the products: RMS norm, rotary embedding, gated activations, writing keys and values.

Each is one launch that reads its operands once. Shapes of the model are constants of the compiled code; the number of
tokens is only the grid, so that a step of another size compiles nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from onebase_kernels.batch import AttentionBatch

_NORM_NUMBERS = 2048  # numbers of a program of the norm, if its rows are shorter than that
_GATE_NUMBERS = 1024


@triton.jit
def _normalize(x, weight, cols, size: tl.constexpr, eps):
    """`reference.rms_norm` of fp32 rows x [ROWS, COLS], zero beyond `size`; `weight` points to the norm's."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / size + eps)
    weights = tl.load(weight + cols, mask=cols < size, other=0.0)
    rounded = (x * scale[:, None]).to(weights.dtype)
    return rounded.to(tl.float32) * weights.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    num_rows,
    eps,
    TOKEN_STRIDE: tl.constexpr,
    ROWS_PER_TOKEN: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Rows of x: ROWS_PER_TOKEN of them side by side in each token, tokens TOKEN_STRIDE numbers apart."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < num_rows)[:, None] & (cols < SIZE)[None, :]
    starts = rows // ROWS_PER_TOKEN * TOKEN_STRIDE + rows % ROWS_PER_TOKEN * SIZE
    x = tl.load(x_ptr + starts[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    y = _normalize(x, weight_ptr, cols, SIZE, eps)
    tl.store(y_ptr + rows[:, None] * SIZE + cols[None, :], y, mask=inside)


@triton.jit
def add_rms_norm_kernel(hidden_ptr, delta_ptr, weight_ptr, y_ptr, eps, SIZE: tl.constexpr, COLS: tl.constexpr):
    """A program has one row of hidden, delta and y."""
    cols = tl.arange(0, COLS)
    inside = (cols < SIZE)[None, :]
    at = tl.program_id(0).to(tl.int64) * SIZE + cols[None, :]
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    total = (hidden.to(tl.float32) + delta.to(tl.float32)).to(hidden.dtype)
    tl.store(hidden_ptr + at, total, mask=inside)
    y = _normalize(total.to(tl.float32), weight_ptr, cols, SIZE, eps)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def _rotate(
    heads_ptr,
    cos,
    sin,
    NUM_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Rotate one token's heads of SIZE numbers; cos and sin are [1, COLS], COLS and HEADS powers of two."""
    heads, cols = tl.arange(0, HEADS), tl.arange(0, COLS)
    inside = (heads < NUM_HEADS)[:, None] & (cols < HALF)[None, :]
    at = heads_ptr + heads[:, None] * SIZE + cols[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, first * cos - second * sin, mask=inside)
    tl.store(at + HALF, second * cos + first * sin, mask=inside)


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    Q_HEADS_PADDED: tl.constexpr,
    K_HEADS_PADDED: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program has one token's heads of q and k."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    at = tl.load(positions_ptr + token) * HALF + cols
    cos = tl.load(cos_ptr + at, mask=cols < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + at, mask=cols < HALF, other=0.0)[None, :]
    _rotate(q_ptr + token * Q_STRIDE, cos, sin, Q_HEADS, SIZE, HALF, Q_HEADS_PADDED, COLS)
    _rotate(k_ptr + token * K_STRIDE, cos, sin, K_HEADS, SIZE, HALF, K_HEADS_PADDED, COLS)


@triton.jit
def write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program has one token; slot -1 is a token that only fills a step of fixed size up, and is written nowhere."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    cols = tl.arange(0, COLS)
    inside = (cols < SIZE) & (slot >= 0)
    tl.store(k_cache_ptr + slot * SIZE + cols, tl.load(k_ptr + token * K_STRIDE + cols, mask=inside), mask=inside)
    tl.store(v_cache_ptr + slot * SIZE + cols, tl.load(v_ptr + token * V_STRIDE + cols, mask=inside), mask=inside)


@triton.jit
def gate_kernel(gate_up_ptr, y_ptr, SIZE: tl.constexpr, IS_GELU: tl.constexpr, COLS: tl.constexpr):
    """A program has COLS columns of a row; the activation is gelu by its tanh form, or silu."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < SIZE
    gate = tl.load(gate_up_ptr + row * (2 * SIZE) + cols, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * (2 * SIZE) + SIZE + cols, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    exponent = wide
    if IS_GELU:  # x (1 + tanh(u)) / 2 is x / (1 + e^-2u), with u = √(2 / π) (x + 0.044715 x³)
        exponent = wide * (1.5957691216 + 0.0713548163 * wide * wide)
    activated = (wide / (1.0 + tl.exp(-exponent))).to(gate.dtype)
    tl.store(y_ptr + row * SIZE + cols, activated.to(tl.float32) * up.to(tl.float32), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`; x [T, K] or [T, H, K], whose tokens may lie apart."""
    size, rows_per_token = x.shape[-1], x.shape[1:-1].numel()
    num_rows = x.shape[0] * rows_per_token
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cols = triton.next_power_of_2(size)
    rows = max(1, _NORM_NUMBERS // cols) if rows_per_token > 1 else 1
    if num_rows:
        rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x, weight, y, num_rows, eps, x.stride(0), rows_per_token, size, rows, cols, num_warps=warps_for(rows * cols)
        )
    return y


def add_rms_norm_(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.add_rms_norm_`."""
    rows, size = hidden.shape
    y = torch.empty_like(hidden)
    cols = triton.next_power_of_2(size)
    if rows:
        add_rms_norm_kernel[(rows,)](hidden, delta, weight, y, eps, size, cols, num_warps=warps_for(cols))
    return y


def apply_rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """As `reference.apply_rope_`."""
    (tokens, q_heads, size), k_heads, half = q.shape, k.shape[1], cos.shape[1]
    padded = [triton.next_power_of_2(number) for number in (q_heads, k_heads, half)]
    if tokens:
        rope_kernel[(tokens,)](
            q, k, cos, sin, positions, q.stride(0), k.stride(0), q_heads, k_heads, size, half, *padded
        )


def write_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """As `reference.write_kv_`."""
    size = k.shape[1] * k.shape[2]
    if len(k):
        write_kv_kernel[(len(k),)](
            *(k, v, k_cache, v_cache, batch.slot_mapping),
            *(k.stride(0), v.stride(0), size, triton.next_power_of_2(size)),
        )


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.silu_mul`."""
    return _gate(gate_up, is_gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.gelu_mul`."""
    return _gate(gate_up, is_gelu=True)


def _gate(gate_up: Tensor, is_gelu: bool) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        gate_kernel[(rows, triton.cdiv(size, _GATE_NUMBERS))](gate_up, y, size, is_gelu, _GATE_NUMBERS)
    return y


def warps_for(numbers: int) -> int:
    """Warps for a program of so many numbers, a power of two: 16 or so for each thread, in four to sixteen warps.

    Fewer where there is not a number for each thread: several warps would then hold the same ones, and one could read
    what another has already written in place.
    """
    return min(16, max(1, min(4, numbers // 32), numbers // 512))
