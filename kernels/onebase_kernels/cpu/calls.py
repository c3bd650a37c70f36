"""What goes over to C++: the structures of `step.h` and of each op's source, field by field. It computes nothing."""

import ctypes
from collections.abc import Mapping

import torch

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""Element types in the C interface; simd.h has the same numbers."""
DTYPES: Mapping[torch.dtype, int] = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
"""What is computed in."""

Pointer = ctypes.c_void_p
Int = ctypes.c_int64
Code = ctypes.c_int32
Float = ctypes.c_float


class Step(ctypes.Structure):
    """step.h: what changes from step to step."""

    _fields_ = (
        ("rows", Int),
        ("token_ids", Pointer),
        ("positions", Pointer),
        ("slot_mapping", Pointer),
        ("num_requests", Int),
        ("query_starts", Pointer),
        ("context_lens", Pointer),
        ("block_tables", Pointer),
        ("table_width", Int),
        ("num_segments", Int),
        ("segments", Pointer),
        ("arena", Pointer),
        ("adapter_table", Pointer),
        ("slots", Int),
        ("adapters_are_int8", Int),
        ("num_replaced", Int),
        ("replaced_rows", Pointer),
        ("replacements", Pointer),
    )


class BlockwiseSlice(ctypes.Structure):
    """blockwise_weight.h: one weight of a group."""

    _fields_ = (("nested_absmax", Pointer), ("offset", Float), ("num_outputs", Int))


class BlockwiseGroup(ctypes.Structure):
    """blockwise_weight.h: the weights of a projection group, packed."""

    _fields_ = (
        ("values", Pointer),
        ("codes", Pointer),
        ("scales", Pointer),
        ("quant_map", Pointer),
        ("slices", Pointer),
        ("num_outputs", Int),
        ("num_inputs", Int),
    )


class QuantizedLinear(ctypes.Structure):
    """quantized_linear.cpp."""

    op: str
    _fields_ = (
        ("group", Pointer),
        ("x", Pointer),
        ("y", Pointer),
        ("bias", Pointer),
        ("x_dtype", Code),
        ("y_dtype", Code),
    )


class BlockwiseLinear(QuantizedLinear):
    """Its group is `BlockwiseGroup`."""

    op = "onebase_blockwise_linear"


class Int4Weights(ctypes.Structure):
    """int4_weight.h: the weights of a projection group, packed."""

    _fields_ = (
        ("codes", Pointer),
        ("scales", Pointer),
        ("minimums", Pointer),
        ("num_outputs", Int),
        ("num_inputs", Int),
        ("group_size", Int),
    )


class Int4Linear(QuantizedLinear):
    """Its group is `Int4Weights`."""

    op = "onebase_int4_linear"


class Int8Group(ctypes.Structure):
    """int8_weight.h: the weights of a projection group, packed."""

    _fields_ = (("codes", Pointer), ("absmax", Pointer), ("num_outputs", Int), ("num_inputs", Int))


class Int8Linear(QuantizedLinear):
    """Its group is `Int8Group`."""

    op = "onebase_int8_linear"


class DenseLinear(ctypes.Structure):
    """dense_linear.cpp."""

    op = "onebase_dense_linear"
    _fields_ = (
        ("x", Pointer),
        ("weight", Pointer),
        ("bias", Pointer),
        ("y", Pointer),
        ("num_outputs", Int),
        ("num_inputs", Int),
        ("y_dtype", Code),
    )


class AddLora(ctypes.Structure):
    """lora.cpp."""

    op = "onebase_add_lora"
    _fields_ = (
        ("y", Pointer),
        ("x", Pointer),
        ("widths", Pointer),
        ("num_slices", Int),
        ("num_inputs", Int),
        ("num_outputs", Int),
        ("place", Int),
        ("dtype", Code),
        ("is_started", Code),
    )


class StartLora(ctypes.Structure):
    """lora.cpp: an `AddLora` whose y is not there yet."""

    op = "onebase_start_lora"
    _fields_ = AddLora._fields_


class Matrix(ctypes.Structure):
    """copy_matrices.cpp."""

    _fields_ = (
        ("source", Int),
        ("rows", Int),
        ("columns", Int),
        ("offset", Int),
        ("scale", Float),
        ("dtype", Code),
        ("is_transposed", Code),
        ("scales", Int),
    )


class Attention(ctypes.Structure):
    """attention.cpp."""

    op = "onebase_attention"
    _fields_ = (
        ("q", Pointer),
        ("out", Pointer),
        ("k_cache", Pointer),
        ("v_cache", Pointer),
        ("q_stride", Int),
        ("block_stride", Int),
        ("slot_stride", Int),
        ("head_stride", Int),
        ("block_size", Int),
        ("heads", Int),
        ("kv_heads", Int),
        ("head_size", Int),
        ("window", Int),
        ("scale", Float),
        ("softcap", Float),
        ("dtype", Code),
    )


class Embed(ctypes.Structure):
    """elementwise.cpp."""

    op = "onebase_embed"
    _fields_ = (("table", Pointer), ("y", Pointer), ("row_bytes", Int), ("scale", Float), ("dtype", Code))


class ReplaceRows(ctypes.Structure):
    """elementwise.cpp."""

    op = "onebase_replace_rows"
    _fields_ = (("x", Pointer), ("row_bytes", Int))


class RmsNorm(ctypes.Structure):
    """elementwise.cpp; `delta` may be null."""

    op = "onebase_rms_norm"
    _fields_ = (
        ("x", Pointer),
        ("delta", Pointer),
        ("weight", Pointer),
        ("y", Pointer),
        ("x_stride", Int),
        ("heads", Int),
        ("size", Int),
        ("eps", Float),
        ("dtype", Code),
    )


class Add(ctypes.Structure):
    """elementwise.cpp."""

    op = "onebase_add"
    _fields_ = (("x", Pointer), ("delta", Pointer), ("size", Int), ("scale", Float), ("dtype", Code))


class LayerNorm(ctypes.Structure):
    """elementwise.cpp; `bias` may be null."""

    op = "onebase_layer_norm"
    _fields_ = (
        ("x", Pointer),
        ("weight", Pointer),
        ("bias", Pointer),
        ("y", Pointer),
        ("size", Int),
        ("eps", Float),
        ("dtype", Code),
    )


class Rope(ctypes.Structure):
    """elementwise.cpp."""

    op = "onebase_rope"
    _fields_ = (
        ("x", Pointer),
        ("x_stride", Int),
        ("heads", Int),
        ("head_size", Int),
        ("half", Int),
        ("cos", Pointer),
        ("sin", Pointer),
        ("dtype", Code),
    )


class SiluMul(ctypes.Structure):
    """elementwise.cpp."""

    op = "onebase_silu_mul"
    _fields_ = (("gate_up", Pointer), ("y", Pointer), ("size", Int), ("dtype", Code))


class GeluMul(SiluMul):
    """elementwise.cpp; the fields are SiluMul's."""

    op = "onebase_gelu_mul"


class WriteCache(ctypes.Structure):
    """elementwise.cpp; strides and sizes are bytes."""

    op = "onebase_write_cache"
    _fields_ = (
        ("x", Pointer),
        ("x_stride", Int),
        ("cache", Pointer),
        ("block_stride", Int),
        ("slot_stride", Int),
        ("head_stride", Int),
        ("block_size", Int),
        ("heads", Int),
        ("head_bytes", Int),
    )


class BestTokens(ctypes.Structure):
    """best_tokens.cpp."""

    _fields_ = (
        ("x", Pointer),
        ("head", Pointer),
        ("codes", Pointer),
        ("scales", Pointer),
        ("errors", Pointer),
        ("tokens", Pointer),
        ("rows", Int),
        ("vocab", Int),
        ("num_inputs", Int),
    )


class ChooseTokens(ctypes.Structure):
    """sampling.cpp; not an op of a step, for its rows are those that sample."""

    _fields_ = (
        ("logits", Pointer),
        ("temperature", Pointer),
        ("top_k", Pointer),
        ("top_p", Pointer),
        ("min_p", Pointer),
        ("uniform", Pointer),
        ("tokens", Pointer),
        ("rows", Int),
        ("vocab", Int),
    )


Call = (
    QuantizedLinear
    | DenseLinear
    | StartLora
    | AddLora
    | Attention
    | Embed
    | ReplaceRows
    | Add
    | RmsNorm
    | LayerNorm
    | Rope
    | SiluMul
    | WriteCache
)
"""An op with its operands; `op` names the function that runs it."""

CALLS = (
    *(BlockwiseLinear, Int4Linear, Int8Linear, DenseLinear, StartLora, AddLora, Attention, Embed, ReplaceRows),
    *(Add, RmsNorm, LayerNorm, Rope, SiluMul, GeluMul, WriteCache),
)


class Op(ctypes.Structure):
    """program.cpp: one op of a program."""

    _fields_ = (("run", Pointer), ("call", Pointer))
