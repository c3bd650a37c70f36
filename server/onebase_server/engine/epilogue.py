"""Epilogues against the base: what follows a linear's update as the two vectors that the side path's op takes.

What needs the base's weights, DoRA's norms, is computed here once, when an adapter is attached, never in a step.
"""

import torch
from torch import Tensor

from onebase_adapters.adapter import Epilogue, LowRankPair
from onebase_server.model.arrays import float32
from onebase_server.model.linear import LinearGroup


def gain_and_shift(epilogue: Epilogue, pair: LowRankPair | None, group: LinearGroup, index: int) -> Tensor:
    """fp32 [2, N] of the linear at `index` of a group of the base, whose update is `pair`.

    The op is given y = (W + ΔW) x + b and makes (1 + gain) ⊙ y + shift of it. `Epilogue` wants
    factor ⊙ (ratio ⊙ (y - b) + bias + shift).
    """
    zeros = torch.zeros(group.widths[index])
    base_bias = zeros if group.bias is None else torch.split(group.bias, list(group.widths))[index].float().cpu()
    ratio = zeros + 1
    if epilogue.magnitude is not None:
        ratio = float32(epilogue.magnitude) / _row_norms(group.weight(index), pair)
    factor = zeros + 1 if epilogue.factor is None else float32(epilogue.factor)
    bias = base_bias if epilogue.bias is None else float32(epilogue.bias)
    shift = zeros if epilogue.shift is None else float32(epilogue.shift)
    return torch.stack([factor * ratio - 1, factor * (bias + shift - ratio * base_bias)])


def _row_norms(weight: Tensor, pair: LowRankPair | None) -> Tensor:
    """‖W + ΔW‖ by rows, on the host: weight [N, K] → [N]."""
    if pair is not None:
        lora_a, lora_b = float32(pair.lora_a).to(weight.device), float32(pair.lora_b).to(weight.device)
        weight = torch.addmm(weight, lora_b, lora_a, alpha=pair.scale)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norms.cpu()
