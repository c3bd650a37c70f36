"""The ops on what is already there: bitsandbytes for NF4 and FP4, torch's fused attention. Runs on CPU and CUDA."""

from collections.abc import Sequence

import bitsandbytes  # noqa: F401 - registers torch.ops.bitsandbytes
import torch
from torch import Tensor

from onebase_kernels import reference
from onebase_kernels.batch import LoraBatch
from onebase_kernels.blockwise import BLOCK_SIZE, BlockwiseWeight
from onebase_kernels.quantized import PackedWeights, QuantizedWeight, dequantize, join_linears
from onebase_kernels.sdpa_attention import paged_attention

__all__ = ["add_lora_", "head_logits", "paged_attention", "quantized_linear"]

_FEW_ROWS = 8


def quantized_linear(x: Tensor, packed: PackedWeights, bias: Tensor | None = None) -> Tensor:
    """As `reference.quantized_linear`, through bitsandbytes' op for 4-bit products."""
    return join_linears(packed, lambda weight: _linear(x, weight), bias)


def add_lora_(y: Tensor, x: Tensor, lora: LoraBatch, place: int, widths: Sequence[int], started: object = None) -> None:
    """As `reference.add_lora_`, a segment at a time: one product for all slices' A, then one for each slice's B."""
    for slot, start, stop in lora.segments:
        # On the CPU a bf16 product costs some 20 µs before it starts, more than a few rows take in fp32.
        is_short = x.device.type == "cpu" and stop - start <= _FEW_ROWS
        compute_dtype = torch.float32 if is_short else x.dtype
        reference.add_adapter_(y[start:stop], x[start:stop], lora, lora.table[place, slot], widths, compute_dtype)


def head_logits(hidden: Tensor, head: Tensor | PackedWeights) -> Tensor:
    """As `reference.head_logits`."""
    return reference.head_logits(hidden, head) if isinstance(head, Tensor) else quantized_linear(hidden, head).float()


def _linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    # bitsandbytes' AVX-512 code takes wrong scales where a block crosses rows.
    if not isinstance(weight, BlockwiseWeight) or weight.shape[1] % BLOCK_SIZE:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype))
    nested = weight.nested
    result: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x,
        weight.codes.unsqueeze(1),
        weight.shape,
        nested.absmax if nested else weight.absmax,
        BLOCK_SIZE,
        weight.codebook.name,
        absmax_8bit=weight.absmax if nested else None,
        absmax_code=nested.quant_map if nested else None,
        absmax_offset=nested.offset if nested else None,
    )
    return result
