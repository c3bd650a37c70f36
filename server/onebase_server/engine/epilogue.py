"""Epilogues against the base: what follows a linear's update as the two vectors that the side path's op takes.

What needs the base's weights, DoRA's norms, is computed here once, when an adapter is attached, never in a step.
"""

import torch
from torch import Tensor

from onebase_adapters.adapter import Epilogue, LowRankPair
from onebase_server.model.adapted_linear import adapted_bias, output_scale, updated_weight
from onebase_server.model.linear import LinearGroup


def gain_and_shift(epilogue: Epilogue, pair: LowRankPair | None, group: LinearGroup, index: int) -> Tensor:
    """fp32 [2, N] of the linear at `index` of a group of the base, whose update is `pair`.

    The op is given y = (W + ΔW) x + b and makes (1 + gain) ⊙ y + shift of it. `Epilogue` wants
    factor ⊙ (ratio ⊙ (y - b) + bias + shift).
    """
    zeros = torch.zeros(group.widths[index])
    base_bias = zeros if group.bias is None else torch.split(group.bias, list(group.widths))[index].float().cpu()
    scale = output_scale(epilogue, lambda: updated_weight(group.weight(index), pair))
    return torch.stack([scale - 1, adapted_bias(base_bias, epilogue) - scale * base_bias])
