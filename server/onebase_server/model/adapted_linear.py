"""A projection of the base as an adapter makes it, in fp32: its weight, its bias and what its outputs are scaled by.

A step computes the difference to the base (`engine/epilogue`), a merged checkpoint holds the projection itself
(`merged_checkpoint`). It knows neither.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from onebase_adapters.adapter import Epilogue, LowRankPair
from onebase_server.model.arrays import float32


def updated_weight(weight: Tensor, pair: LowRankPair | None) -> Tensor:
    """`W + ΔW`, [N, K], on the weight's device."""
    if pair is None:
        return weight
    lora_a, lora_b = float32(pair.lora_a).to(weight.device), float32(pair.lora_b).to(weight.device)
    return torch.addmm(weight, lora_b, lora_a, alpha=pair.scale)


def output_scale(epilogue: Epilogue, updated: Callable[[], Tensor]) -> Tensor:
    """What the rows of `W + ΔW` are multiplied by, factor ⊙ magnitude / ‖W + ΔW‖; [N], on the host.

    `updated` makes `W + ΔW` [N, K], and is called only if there are magnitudes.
    """
    scale = torch.ones(epilogue.num_outputs)
    if epilogue.magnitude is not None:
        scale = float32(epilogue.magnitude) / torch.linalg.vector_norm(updated(), dim=1).cpu()
    return scale if epilogue.factor is None else scale * float32(epilogue.factor)


def adapted_weight(weight: Tensor, pair: LowRankPair | None, epilogue: Epilogue | None) -> Tensor:
    """The weight [N, K] as the adapter makes it."""
    updated = updated_weight(weight, pair)
    return updated if epilogue is None else updated * output_scale(epilogue, lambda: updated).unsqueeze(1)


def adapted_bias(base_bias: Tensor, epilogue: Epilogue | None) -> Tensor:
    """factor ⊙ (bias + shift), [N]; `base_bias` is zeros where the base has none."""
    if epilogue is None:
        return base_bias
    bias = base_bias if epilogue.bias is None else float32(epilogue.bias)
    if epilogue.shift is not None:
        bias = bias + float32(epilogue.shift)
    return bias if epilogue.factor is None else bias * float32(epilogue.factor)
