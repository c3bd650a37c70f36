"""The ops on the C++ library: addresses and sizes go over, nothing is computed here.

What the library does not carry (fp16, odd shapes, views) goes to the torch versions, so that every op takes whatever
the reference takes.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from onebase_kernels import reference, sdpa_attention
from onebase_kernels.batch import AttentionBatch, LoraBatch, ReplacedRows, SamplingBatch, StepInputs
from onebase_kernels.cpu import blockwise_packing, calls, execution, head_screen, int4_packing, int8_packing, memory
from onebase_kernels.cpu.calls import DTYPES, Step
from onebase_kernels.cpu.execution import are_plain, empty, run
from onebase_kernels.cpu.head_screen import TiledScreen
from onebase_kernels.cpu.matrix_copying import copy_file_matrices_ as copy_file_matrices_
from onebase_kernels.cpu.matrix_copying import copy_matrices_ as copy_matrices_
from onebase_kernels.cpu.tiles import TiledWeights
from onebase_kernels.quantized import PackedWeights, QuantizedWeight
from onebase_kernels.screen import HeadScreen

_LANES = 16
_HEAD_SIZES = frozenset({16, 32, 48, 64, 80, 96, 128, 192, 256})
"""attention.cpp has one function for each."""
_STARTED = object()
"""What `start_lora` returns: the library itself keeps what has begun."""


def pack_quantized(weights: Sequence[QuantizedWeight]) -> PackedWeights:
    """As `reference.pack_quantized`, in tiles."""
    if blockwise_packing.can_pack(weights):
        return blockwise_packing.pack(weights)
    if int4_packing.can_pack(weights):
        return int4_packing.pack(weights)
    if int8_packing.can_pack(weights):
        return int8_packing.pack(weights)
    return reference.pack_quantized(weights)


def unpack_quantized(packed: PackedWeights) -> tuple[QuantizedWeight, ...]:
    """As `reference.unpack_quantized`, bit by bit."""
    return packed.unpack() if isinstance(packed, TiledWeights) else reference.unpack_quantized(packed)


def pack_dense(weight: Tensor) -> Tensor:
    """As `reference.pack_dense`: a copy in huge pages."""
    return memory.resident(weight) if weight.device.type == "cpu" else weight


def pack_screen(head: Tensor) -> HeadScreen | None:
    """As `reference.pack_screen`, where there are products of bfloat16."""
    return head_screen.pack(head) if head_screen.can_pack(head) and _has_dense_linear() else None


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `reference.allocate`, in huge pages."""
    return memory.empty(shape, dtype) if device.type == "cpu" else reference.allocate(shape, dtype, device)


def allocate_kv(num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `reference.allocate_kv`, in huge pages, block by block and head by head.

    What attention reads at a time, a head's keys in a block, then lies side by side, and what all layers have of a
    block fills few pages, so that huge ones do not cost more memory than is written to.
    """
    blocks, block_size, heads, head_size = shape
    if dtype not in DTYPES or head_size not in _HEAD_SIZES or device.type != "cpu":
        return reference.allocate_kv(num_layers, shape, dtype, device)
    whole = memory.empty((blocks, num_layers, 2, heads, block_size, head_size), dtype)
    return whole.permute(1, 2, 0, 4, 3, 5)


def record(forward: Callable[[StepInputs], Tensor], largest: StepInputs) -> Callable[[StepInputs], Tensor]:
    """As `reference.record`: a program where the library carries all of the step, else `forward` as it is."""
    try:
        return execution.record(forward, len(largest.token_ids))
    except execution.NotRecordable:
        return forward


def embed(token_ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """As `reference.embed`."""
    if not are_plain(token_ids, table) or (scale != 1 and table.dtype not in DTYPES):
        return reference.embed(token_ids, table, scale)
    y = empty((token_ids.shape[0], table.shape[1]), table.dtype)
    call = calls.Embed(
        table=table.data_ptr(),
        y=y.data_ptr(),
        row_bytes=table.stride(0) * table.element_size(),
        scale=scale,
        dtype=DTYPES.get(table.dtype, calls.FLOAT32),
    )
    run(call, Step(rows=token_ids.shape[0], token_ids=token_ids.data_ptr()))
    return y


def replace_rows_(x: Tensor, replaced: ReplacedRows | None) -> None:
    """As `reference.replace_rows_`."""
    if not are_plain(x) or (replaced and (replaced.vectors.dtype != x.dtype or not are_plain(replaced.vectors))):
        reference.replace_rows_(x, replaced)
        return
    step = Step()
    execution.add_replaced(step, replaced)
    run(calls.ReplaceRows(x=x.data_ptr(), row_bytes=x.stride(0) * x.element_size()), step)


def quantized_linear(x: Tensor, packed: PackedWeights, bias: Tensor | None = None) -> Tensor:
    """As `reference.quantized_linear`, fused: no weight is ever dequantised in memory."""
    if not isinstance(packed, TiledWeights):
        return reference.quantized_linear(x, packed, bias)
    if x.dtype not in DTYPES or not x.is_contiguous() or (bias is not None and bias.dtype != x.dtype):
        wide_bias = None if bias is None else bias.float()
        return quantized_linear(x.float().contiguous(), packed, wide_bias).to(x.dtype)
    y = empty((x.shape[0], packed.out_features), x.dtype)
    _quantized_linear(x, packed, bias, y)
    return y


def _quantized_linear(x: Tensor, packed: TiledWeights, bias: Tensor | None, y: Tensor) -> None:
    call = packed.call(
        group=packed.address,
        x=x.data_ptr(),
        y=y.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        x_dtype=DTYPES[x.dtype],
        y_dtype=DTYPES[y.dtype],
    )
    run(call, Step(rows=x.shape[0]))


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.dense_linear`."""
    if not _carries_dense(x, weight):
        return reference.dense_linear(x, weight, bias)
    y = empty((x.shape[0], weight.shape[0]), x.dtype)
    _dense_linear(x, weight, bias, y)
    return y


def head_logits(hidden: Tensor, head: Tensor | PackedWeights) -> Tensor:
    """As `reference.head_logits`; bf16 is not rounded once more on the way to fp32."""
    if isinstance(head, TiledWeights) and hidden.dtype in DTYPES and hidden.is_contiguous():
        logits = empty((hidden.shape[0], head.out_features), torch.float32)
        _quantized_linear(hidden, head, None, logits)
        return logits
    if isinstance(head, Tensor) and _carries_dense(hidden, head):
        logits = empty((hidden.shape[0], head.shape[0]), torch.float32)
        _dense_linear(hidden, head, None, logits)
        return logits
    return reference.head_logits(hidden, head)


def _carries_dense(x: Tensor, weight: Tensor) -> bool:
    is_bf16 = x.dtype == weight.dtype == torch.bfloat16 and _has_dense_linear()
    outputs, inputs = weight.shape
    return is_bf16 and are_plain(x, weight) and outputs % _LANES == 0 and inputs % (2 * _LANES) == 0


def _has_dense_linear() -> bool:
    return bool(execution.library.onebase_has_dense_linear())


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    call = calls.DenseLinear(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        num_outputs=weight.shape[0],
        num_inputs=weight.shape[1],
        y_dtype=DTYPES[y.dtype],
    )
    run(call, Step(rows=x.shape[0]))


def start_lora(x: Tensor, lora: LoraBatch, place: int, widths: Sequence[int]) -> object:
    """As `reference.start_lora`: the product that follows computes the shrink, and fetches what both passes read."""
    if not _carries_lora(x, lora):
        return None
    _run_lora(calls.StartLora, None, x, lora, place, widths, started=None)
    return _STARTED


def add_lora_(y: Tensor, x: Tensor, lora: LoraBatch, place: int, widths: Sequence[int], started: object = None) -> None:
    """As `reference.add_lora_`, all segments and slices in one call."""
    if not _carries_lora(x, lora) or y.dtype != x.dtype or not are_plain(y):
        reference.add_lora_(y, x, lora, place, widths)
        return
    _run_lora(calls.AddLora, y, x, lora, place, widths, started)


def _carries_lora(x: Tensor, lora: LoraBatch) -> bool:
    return x.dtype in DTYPES and are_plain(x, lora.arena, lora.table)


def _run_lora(
    kind: type[calls.AddLora] | type[calls.StartLora],
    y: Tensor | None,
    x: Tensor,
    lora: LoraBatch,
    place: int,
    widths: Sequence[int],
    started: object,
) -> None:
    call = kind(
        y=None if y is None else y.data_ptr(),
        x=x.data_ptr(),
        widths=ctypes.addressof(_widths(tuple(widths))),
        num_slices=len(widths),
        num_inputs=x.shape[1],
        num_outputs=sum(widths),
        place=place,
        dtype=DTYPES[x.dtype],
        is_started=started is _STARTED,
    )
    step = Step(rows=x.shape[0])
    execution.add_segments(step, lora)
    run(call, step)


@cache  # a model has but a few, and programs point to them
def _widths(widths: tuple[int, ...]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(widths))(*widths)


def write_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """As `reference.write_kv_`."""
    for new, cached in ((k, k_cache), (v, v_cache)):
        is_plain = _has_plain_tokens(new) and cached.stride(3) == 1 and batch.slot_mapping.is_contiguous()
        if not is_plain or new.dtype != cached.dtype:
            reference.write_kv_(k, v, k_cache, v_cache, batch)
            return
    for new, cached in ((k, k_cache), (v, v_cache)):
        size = new.element_size()
        call = calls.WriteCache(
            x=new.data_ptr(),
            x_stride=new.stride(0) * size,
            cache=cached.data_ptr(),
            block_stride=cached.stride(0) * size,
            slot_stride=cached.stride(1) * size,
            head_stride=cached.stride(2) * size,
            block_size=cached.shape[1],
            heads=cached.shape[2],
            head_bytes=cached.shape[3] * size,
        )
        run(call, Step(rows=new.shape[0], slot_mapping=batch.slot_mapping.data_ptr()))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `reference.paged_attention`."""
    is_carried = q.dtype in DTYPES and q.dtype == k_cache.dtype == v_cache.dtype and q.shape[2] in _HEAD_SIZES
    is_plain = _has_plain_tokens(q) and batch.block_tables.is_contiguous() and k_cache.stride(3) == 1
    if not is_carried or not is_plain or k_cache.stride() != v_cache.stride():
        return sdpa_attention.paged_attention(q, k_cache, v_cache, batch, scale, window, softcap)
    out = empty(q.shape, q.dtype)
    call = calls.Attention(
        q=q.data_ptr(),
        out=out.data_ptr(),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        q_stride=q.stride(0),
        block_stride=k_cache.stride(0),
        slot_stride=k_cache.stride(1),
        head_stride=k_cache.stride(2),
        block_size=k_cache.shape[1],
        heads=q.shape[1],
        kv_heads=k_cache.shape[2],
        head_size=q.shape[2],
        window=window or 0,
        scale=scale,
        softcap=softcap or 0,
        dtype=DTYPES[q.dtype],
    )
    run(call, execution.attention_step(batch))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    if not _carries_norm(x, weight):
        return reference.rms_norm(x, weight, eps)
    return _rms_norm(x, None, weight, eps)


def add_rms_norm_(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.add_rms_norm_`."""
    if not _carries_norm(hidden, weight) or not are_plain(hidden, delta) or hidden.dtype != delta.dtype:
        return reference.add_rms_norm_(hidden, delta, weight, eps)
    return _rms_norm(hidden, delta, weight, eps)


def _carries_norm(x: Tensor, weight: Tensor) -> bool:
    has_plain_rows = x.stride(1) == 1 if x.ndim == 2 else _has_plain_tokens(x)
    return x.dtype in DTYPES and x.dtype == weight.dtype and has_plain_rows


def _rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x is [rows, size] or [rows, heads, size], and each head normalised alone."""
    y = empty(x.shape, x.dtype)
    call = calls.RmsNorm(
        x=x.data_ptr(),
        delta=None if delta is None else delta.data_ptr(),
        weight=weight.data_ptr(),
        y=y.data_ptr(),
        x_stride=x.stride(0),
        heads=x.shape[1] if x.ndim == 3 else 1,
        size=x.shape[-1],
        eps=eps,
        dtype=DTYPES[x.dtype],
    )
    run(call, Step(rows=x.shape[0]))
    return y


def add_(hidden: Tensor, delta: Tensor, scale: float = 1.0) -> None:
    """As `reference.add_`."""
    if hidden.dtype not in DTYPES or hidden.dtype != delta.dtype or not are_plain(hidden, delta):
        reference.add_(hidden, delta, scale)
        return
    call = calls.Add(
        x=hidden.data_ptr(),
        delta=delta.data_ptr(),
        size=hidden.shape[1],
        scale=scale,
        dtype=DTYPES[hidden.dtype],
    )
    run(call, Step(rows=hidden.shape[0]))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`."""
    is_alike = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    if x.dtype not in DTYPES or not is_alike or not are_plain(x, weight):
        return reference.layer_norm(x, weight, bias, eps)
    y = empty(x.shape, x.dtype)
    call = calls.LayerNorm(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        size=x.shape[1],
        eps=eps,
        dtype=DTYPES[x.dtype],
    )
    run(call, Step(rows=x.shape[0]))
    return y


def apply_rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """As `reference.apply_rope_`."""
    is_carried = q.dtype in DTYPES and _has_plain_tokens(q) and _has_plain_tokens(k) and are_plain(cos, sin, positions)
    if not is_carried:
        reference.apply_rope_(q, k, cos, sin, positions)
        return
    for heads in (q, k):
        call = calls.Rope(
            x=heads.data_ptr(),
            x_stride=heads.stride(0),
            heads=heads.shape[1],
            head_size=heads.shape[2],
            half=cos.shape[1],
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            dtype=DTYPES[heads.dtype],
        )
        run(call, Step(rows=heads.shape[0], positions=positions.data_ptr()))


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.silu_mul`."""
    return _gate(gate_up, calls.SiluMul) if _carries_gate(gate_up) else reference.silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.gelu_mul`."""
    return _gate(gate_up, calls.GeluMul) if _carries_gate(gate_up) else reference.gelu_mul(gate_up)


def _carries_gate(gate_up: Tensor) -> bool:
    return gate_up.dtype in DTYPES and gate_up.is_contiguous()


def _gate(gate_up: Tensor, kind: type[calls.SiluMul]) -> Tensor:
    size = gate_up.shape[1] // 2
    y = empty((gate_up.shape[0], size), gate_up.dtype)
    call = kind(gate_up=gate_up.data_ptr(), y=y.data_ptr(), size=size, dtype=DTYPES[gate_up.dtype])
    run(call, Step(rows=gate_up.shape[0]))
    return y


def best_tokens(hidden: Tensor, head: Tensor, screen: HeadScreen | None) -> Tensor:
    """As `reference.best_tokens`: with a screen, the logits of those tokens alone that may be the best."""
    if not isinstance(screen, TiledScreen) or not _carries_dense(hidden, head):
        return head_logits(hidden, head).argmax(dim=-1)
    tokens = torch.empty(hidden.shape[0], dtype=torch.int64)
    call = calls.BestTokens(
        x=hidden.data_ptr(),
        head=head.data_ptr(),
        codes=screen.codes.data_ptr(),
        scales=screen.scales.data_ptr(),
        errors=screen.errors.data_ptr(),
        tokens=tokens.data_ptr(),
        rows=hidden.shape[0],
        vocab=head.shape[0],
        num_inputs=head.shape[1],
    )
    execution.library.onebase_best_tokens(ctypes.byref(call))
    return tokens


def choose_tokens(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """As `reference.choose_tokens`."""
    parameters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.uniform)
    if logits.dtype != torch.float32 or not are_plain(logits, *parameters):
        return reference.choose_tokens(logits, sampling)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    call = calls.ChooseTokens(
        logits=logits.data_ptr(),
        temperature=sampling.temperature.data_ptr(),
        top_k=sampling.top_k.data_ptr(),
        top_p=sampling.top_p.data_ptr(),
        min_p=sampling.min_p.data_ptr(),
        uniform=sampling.uniform.data_ptr(),
        tokens=tokens.data_ptr(),
        rows=logits.shape[0],
        vocab=logits.shape[1],
    )
    execution.library.onebase_choose_tokens(ctypes.byref(call))
    return tokens


def set_num_threads(count: int) -> None:
    """As `reference.set_num_threads`, for the library's threads and for torch's."""
    execution.library.onebase_set_threads(count)
    torch.set_num_threads(count)


def _has_plain_tokens(heads: Tensor) -> bool:
    """Whether each token's heads [H, D] lie without gaps, however far apart the tokens are."""
    return heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]
