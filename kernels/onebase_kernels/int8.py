"""Row-wise symmetric 8-bit integers, as LLM.int8() keeps weights (arXiv 2208.07339, section 2): to them and back.

A weight is `code · absmax / 127`, with an absmax for each output; every bit is bitsandbytes' `int8_vectorwise_quant`.
Only weights are quantised: activations stay as they are, so that there are no outliers to be kept apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CODE = 127


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A linear's weight [out, in] in int8."""

    codes: Tensor
    """int8 [out, in]."""
    absmax: Tensor
    """fp32 [out]: the largest magnitude of each row."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.absmax.nbytes

    def to(self, device: torch.device) -> "Int8Weight":
        """The same on `device`."""
        return Int8Weight(self.codes.to(device), self.absmax.to(device))


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Round `weight` [out, in] (fp32, bf16 or fp16) to int8."""
    rows = weight.float()
    absmax = rows.abs().amax(dim=1)
    factor = (MAX_CODE / absmax).nan_to_num(0.0, posinf=0.0)  # rows of zeros
    return Int8Weight((rows * factor.unsqueeze(1)).round().to(torch.int8), absmax)


def dequantize_int8(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that the codes stand for, computed in fp32 and rounded once to `dtype`."""
    return (weight.codes * weight.absmax.unsqueeze(1) * (1 / MAX_CODE)).to(dtype)
