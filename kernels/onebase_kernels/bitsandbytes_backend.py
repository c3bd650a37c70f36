"""The ops on what is already there: bitsandbytes for NF4, torch's fused attention. Runs on CPU and CUDA."""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor

from onebase_kernels import reference
from onebase_kernels.batch import Segment
from onebase_kernels.nf4 import BLOCK_SIZE, Nf4Weight
from onebase_kernels.sdpa_attention import paged_attention

__all__ = ["add_lora_", "nf4_linear", "paged_attention"]

# On the CPU bitsandbytes has a fused product for bf16 that beats dequantising up to so many rows (Xeon, AVX-512).
_FEW_ROWS = 8
_FUSED_TILE = 32  # output features that it takes at a time


@dataclass(frozen=True)
class _FusedWeight:
    """A weight in the layout of bitsandbytes' fused CPU product."""

    codes: Tensor
    """uint8 [N, K / 2]: per tile of 32 outputs and per column pair, byte j holds codes j (low) and j + 32 (high)."""
    absmax: Tensor
    """bf16 [K / 64, N]."""


_fused: WeakKeyDictionary[Nf4Weight, _FusedWeight] = WeakKeyDictionary()


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """As `reference.nf4_linear`; on the CPU, few rows of bf16 are multiplied without dequantising.

    That needs a second copy of the codes, made at a weight's first use of this kind; the first copy is mapped from the
    file where it was loaded from one, so that the system may drop it.
    """
    if weight.shape[1] % BLOCK_SIZE:  # bitsandbytes' AVX-512 code takes wrong scales where a block crosses rows
        return reference.nf4_linear(x, weight, bias)
    if len(x) <= _FEW_ROWS and _is_fusable(x, weight):
        return _fused_linear(x, weight, bias)
    nested = weight.nested
    result: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x,
        weight.codes.unsqueeze(1),
        weight.shape,
        nested.absmax if nested else weight.absmax,
        BLOCK_SIZE,
        "nf4",
        bias=bias,
        absmax_8bit=weight.absmax if nested else None,
        absmax_code=nested.quant_map if nested else None,
        absmax_offset=nested.offset if nested else None,
    )
    return result


def add_lora_(
    y: Tensor, x: Tensor, arena: Tensor, table: Tensor, widths: Sequence[int], segments: Sequence[Segment]
) -> None:
    """As `reference.add_lora_`, a segment at a time: one product for all slices' A, then one for each slice's B."""
    for slot, start, stop in segments:
        # On the CPU a bf16 product costs some 20 µs before it starts, more than a few rows take in fp32.
        is_short = x.device.type == "cpu" and stop - start <= _FEW_ROWS
        compute_dtype = torch.float32 if is_short else x.dtype
        reference.add_adapter_(y[start:stop], x[start:stop], arena, table[slot], widths, compute_dtype)


def _is_fusable(x: Tensor, weight: Nf4Weight) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and weight.shape[0] % _FUSED_TILE == 0
        and bool(has_avx512bf16())
    )


def _fused_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
    fused = _fused.get(weight)
    if fused is None:
        fused = _fused[weight] = _to_fused_layout(weight)
    # The op tells NF4 from FP4 by its second value, and takes the block layout for granted.
    y: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        x.contiguous(), fused.codes, weight.shape, fused.absmax, _CODE_OF_NF4, BLOCK_SIZE
    )
    return y if bias is None else y + bias


_CODE_OF_NF4 = torch.tensor([-1.0, -0.7])


def _to_fused_layout(weight: Nf4Weight) -> _FusedWeight:
    out_features, in_features = weight.shape
    codes = torch.stack([weight.codes >> 4, weight.codes & 0xF], dim=1)  # in the order of the weights
    tiles = codes.view(-1, _FUSED_TILE, in_features // 2, 2).transpose(1, 2).reshape(-1, 2, _FUSED_TILE)
    low, high = tiles.unbind(1)
    absmax = weight.scales().view(out_features, -1).T.to(torch.bfloat16).contiguous()
    return _FusedWeight((low | (high << 4)).view(out_features, in_features // 2), absmax)
