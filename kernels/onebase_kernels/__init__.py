"""The ops that the decoder is made of, behind one seam: which back end computes them is chosen once, at start-up.

An op's signature, formula and shapes are its definition in `reference.py`. A back end is a module that has functions of
the same names and signatures; what it lacks, the next one in its chain computes.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

from onebase_kernels import reference
from onebase_kernels.backends import BackendName, BackendUnavailable, best_backend, check_backend
from onebase_kernels.batch import (
    TABLE_COLUMNS,
    AttentionBatch,
    FileMatrix,
    FilePlan,
    LoraBatch,
    Matrix,
    ReplacedRows,
    SamplingBatch,
    Segment,
    StepInputs,
)
from onebase_kernels.blockwise import BlockwiseWeight, NestedScales, quantize_fp4, quantize_nf4
from onebase_kernels.int4 import Int4Weight, dequantize_int4, quantize_int4
from onebase_kernels.int8 import Int8Weight, quantize_int8
from onebase_kernels.quantized import PackedWeights, QuantizedWeight, WeightGroup, dequantize
from onebase_kernels.screen import HeadScreen

__all__ = [
    "TABLE_COLUMNS",
    "AttentionBatch",
    "BackendName",
    "BackendUnavailable",
    "BlockwiseWeight",
    "FileMatrix",
    "FilePlan",
    "HeadScreen",
    "Int4Weight",
    "Int8Weight",
    "LoraBatch",
    "Matrix",
    "NestedScales",
    "PackedWeights",
    "QuantizedWeight",
    "ReplacedRows",
    "SamplingBatch",
    "Segment",
    "StepInputs",
    "WeightGroup",
    "add_",
    "add_lora_",
    "add_rms_norm_",
    "allocate",
    "allocate_kv",
    "apply_rope_",
    "best_backend",
    "best_tokens",
    "choose_tokens",
    "copy_file_matrices_",
    "copy_matrices_",
    "dense_linear",
    "dequantize",
    "dequantize_int4",
    "embed",
    "gelu_mul",
    "head_logits",
    "layer_norm",
    "pack_dense",
    "pack_quantized",
    "pack_screen",
    "paged_attention",
    "quantize_fp4",
    "quantize_int4",
    "quantize_int8",
    "quantize_nf4",
    "quantized_linear",
    "record",
    "replace_rows_",
    "rms_norm",
    "set_num_threads",
    "silu_mul",
    "softcap_",
    "start_lora",
    "unpack_quantized",
    "use_backend",
    "write_kv_",
]

# The modules that are asked for each op, fastest first.
_CHAINS: dict[BackendName, tuple[str, ...]] = {
    "reference": ("reference",),
    "bitsandbytes": ("bitsandbytes_backend", "reference"),
    "cpu": ("cpu.backend", "reference"),
    "triton": ("triton.backend", "reference"),
}

_active: dict[str, Callable[..., Any]] = {}

P = ParamSpec("P")
R = TypeVar("R")


def _dispatched(definition: Callable[P, R]) -> Callable[P, R]:
    """The op of that name and signature in the back end chosen."""
    name = definition.__name__

    @functools.wraps(definition)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = _active[name](*args, **kwargs)
        return result

    return op


pack_quantized = _dispatched(reference.pack_quantized)
unpack_quantized = _dispatched(reference.unpack_quantized)
pack_dense = _dispatched(reference.pack_dense)
pack_screen = _dispatched(reference.pack_screen)
allocate = _dispatched(reference.allocate)
allocate_kv = _dispatched(reference.allocate_kv)
record = _dispatched(reference.record)
embed = _dispatched(reference.embed)
replace_rows_ = _dispatched(reference.replace_rows_)
quantized_linear = _dispatched(reference.quantized_linear)
dense_linear = _dispatched(reference.dense_linear)
start_lora = _dispatched(reference.start_lora)
add_lora_ = _dispatched(reference.add_lora_)
copy_matrices_ = _dispatched(reference.copy_matrices_)
copy_file_matrices_ = _dispatched(reference.copy_file_matrices_)
write_kv_ = _dispatched(reference.write_kv_)
paged_attention = _dispatched(reference.paged_attention)
rms_norm = _dispatched(reference.rms_norm)
add_rms_norm_ = _dispatched(reference.add_rms_norm_)
add_ = _dispatched(reference.add_)
layer_norm = _dispatched(reference.layer_norm)
apply_rope_ = _dispatched(reference.apply_rope_)
silu_mul = _dispatched(reference.silu_mul)
gelu_mul = _dispatched(reference.gelu_mul)
softcap_ = _dispatched(reference.softcap_)
head_logits = _dispatched(reference.head_logits)
best_tokens = _dispatched(reference.best_tokens)
choose_tokens = _dispatched(reference.choose_tokens)
set_num_threads = _dispatched(reference.set_num_threads)

OPS = (
    *(pack_quantized, unpack_quantized, pack_dense, pack_screen, allocate, allocate_kv, record, set_num_threads),
    *(embed, replace_rows_, quantized_linear, dense_linear, start_lora, add_lora_),
    *(copy_matrices_, copy_file_matrices_),
    *(write_kv_, paged_attention, rms_norm, add_rms_norm_, add_, layer_norm, apply_rope_),
    *(silu_mul, gelu_mul, softcap_, head_logits, best_tokens, choose_tokens),
)
"""Everything that a back end may compute."""


def use_backend(name: BackendName | Literal["auto"], device_type: str = "cpu") -> BackendName:
    """Let that back end compute from now on, in the whole process; returns the name that `auto` stands for.

    To be chosen before weights are packed. `device_type` is that of the tensors, `cpu` or `cuda`. Raises
    BackendUnavailable if the back end asked for cannot compute there.
    """
    chosen = best_backend(device_type) if name == "auto" else name
    check_backend(chosen, device_type)
    modules = [importlib.import_module(f"{__name__}.{module}") for module in _CHAINS[chosen]]
    for op in OPS:
        _active[op.__name__] = next(getattr(module, op.__name__) for module in modules if hasattr(module, op.__name__))
    return chosen


use_backend("reference")
