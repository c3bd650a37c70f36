"""Group-wise asymmetric 4-bit integers, the base of QA-LoRA (arXiv 2309.14717, section 3.2): to them and back.

Every `group_size` inputs of an output share a scale and a minimum: a weight is `scale · code + minimum`. Scales are
fp16, as GPTQ's and AWQ's are, so that their checkpoints are carried exactly; minimums are fp32, so that an adapter that
is constant over each group can be folded into them alone. Work goes in chunks, so that the peak is the result and a few
MiB.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
"""Inputs that share a scale and a minimum."""
MAX_CODE = 15

_CHUNK = 1 << 21  # weights worked on at a time


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A linear's weight [out, in] in int4."""

    codes: Tensor
    """uint8 [out, in / 2]: two codes to a byte, the first in the high half."""
    scales: Tensor
    """float16 [out, in / group_size]."""
    minimums: Tensor
    """float32 [out, in / group_size]: what code 0 stands for."""
    shape: tuple[int, int]
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minimums."""
        return self.codes.nbytes + self.scales.nbytes + self.minimums.nbytes

    def to(self, device: torch.device) -> "Int4Weight":
        """The same on `device`."""
        parts = (self.codes.to(device), self.scales.to(device), self.minimums.to(device))
        return Int4Weight(*parts, self.shape, self.group_size)


def quantize_int4(weight: Tensor, group_size: int) -> Int4Weight:
    """Round `weight` [out, in] (fp32, bf16 or fp16): codes go from the least to the largest weight of each group.

    Raises ValueError if `in` is no multiple of the group size.
    """
    out_features, in_features = weight.shape
    if in_features % group_size:
        raise ValueError(f"{in_features} inputs are no multiple of the group size {group_size}.")
    chunks = [_quantize_rows(rows, group_size) for rows in torch.split(weight, max(_CHUNK // in_features, 1))]
    codes, scales, minimums = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Int4Weight(codes, scales, minimums, (out_features, in_features), group_size)


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that the codes stand for, computed in fp32 and rounded once to `dtype`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    rows = max(_CHUNK // weight.shape[1], 1)
    parts = (out, weight.codes, weight.scales, weight.minimums)
    for target, codes, scales, minimums in zip(*(torch.split(part, rows) for part in parts), strict=True):
        groups = torch.stack((codes >> 4, codes & MAX_CODE), dim=-1).view(*scales.shape, weight.group_size)
        # fp16 · 4 bits is exact in fp32, so that the sum is rounded once
        target.copy_((groups * scales.float().unsqueeze(-1) + minimums.unsqueeze(-1)).view(target.shape))
    return out


def _quantize_rows(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minimums of some rows."""
    groups = rows.float().view(rows.shape[0], -1, group_size)
    minimums, maximums = groups.amin(dim=-1), groups.amax(dim=-1)
    scales = ((maximums - minimums) / MAX_CODE).half()
    steps = scales.float().unsqueeze(-1)
    codes = ((groups - minimums.unsqueeze(-1)) / steps).nan_to_num(0.0)  # 0 / 0 in a group of equal weights
    pairs = codes.round().clamp(0, MAX_CODE).to(torch.uint8).view(rows.shape[0], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1], scales, minimums
