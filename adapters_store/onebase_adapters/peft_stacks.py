"""LoRA on stacked weights of a mixture's experts, as PEFT's `target_parameters` has it: to single experts and back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from .adapter import ROUTER, Adapter, Array, LowRankPair, ModuleKey
from .base_layout import BaseLayout
from .errors import InvalidTensors, UnsupportedAdapter
from .fused_projections import fuse_pairs, of_one_scale
from .peft_tensors import STACKED_PARAMETERS, ModuleTensors


@dataclass(frozen=True, slots=True)
class StackedPair(LowRankPair):
    """The updates of all experts: lora_a [experts · rank, in] has the rows of one expert after the other; in lora_b
    [out, rank · experts] the experts take turns."""

    num_experts: int

    @property
    def rank(self) -> int:
        """Of each expert's."""
        return int(self.lora_a.shape[0]) // self.num_experts


def unstack(module: ModuleTensors) -> Iterator[ModuleTensors]:
    """Each expert's own part of a stack; any other module as it is.

    Raises InvalidTensors if it is not of so many experts.
    """
    if module.num_stacked is None:
        yield module
        return
    for expert in range(module.num_stacked):
        tensors = {
            kind: (f"{name} (expert {expert})", _part(kind, name, tensor, expert, module.num_stacked))
            for kind, (name, tensor) in module.tensors.items()
        }
        yield replace(module, expert=expert, num_stacked=None, tensors=tensors)


def _part(kind: str, name: str, tensor: Array, expert: int, num_experts: int) -> Array:
    axis = {"lora_A": 0, "lora_B": 1}.get(kind)
    if axis is None:
        raise InvalidTensors(f"There is {name}, but the parameters of experts have lora_A and lora_B alone.")
    if tensor.ndim != 2 or tensor.shape[axis] % num_experts:
        raise InvalidTensors(f"Tensor {name} has shape {list(tensor.shape)}, which {num_experts} experts cannot share.")
    if axis == 1:
        return tensor[:, expert::num_experts]
    rank = tensor.shape[0] // num_experts
    return tensor[expert * rank : (expert + 1) * rank]


def stack_experts(adapter: Adapter, layout: BaseLayout) -> Adapter:
    """The same adapter with a StackedPair, `(3, "experts.down_proj")`, for what it has for a layer's experts.

    Exactly: at the largest of their ranks, and at the sum of those of gate and up where these do not share A.

    Raises:
        UnsupportedAdapter: it does more to an expert or a router than to add an update, which PEFT does not do to
            parameters.
    """
    for key in adapter.epilogues:
        if key.expert is not None or key.projection == ROUTER:
            raise UnsupportedAdapter(
                f"The adapter does more to {key} than to add a low-rank update (DoRA, (IA)³, biases); of a mixture of "
                "experts it can be served so, but not exported."
            )
    pairs = {key: pair for key, pair in adapter.pairs.items() if key.expert is None}
    for layer in range(layout.num_layers if layout.experts else 0):
        for parameter in STACKED_PARAMETERS:
            if parts := _fused_by_expert(adapter, layout, layer, parameter):
                pairs[ModuleKey(layer, f"experts.{parameter}")] = _stack(parts, layout)
    return replace(adapter, pairs=pairs)


def _fused_by_expert(
    adapter: Adapter, layout: BaseLayout, layer: int, parameter: str
) -> Mapping[ModuleKey, LowRankPair]:
    """What the experts have that the adapter touches, gate and up in one."""
    fused: dict[ModuleKey, LowRankPair] = {}
    assert layout.experts is not None
    for expert in range(layout.experts.count):
        projections = layout.fused.get(parameter, (parameter,))
        widths = {ModuleKey(layer, name, expert): layout.experts.shapes[name][0] for name in projections}
        if parts := {key: adapter.pairs[key] for key in widths if key in adapter.pairs}:
            fused[ModuleKey(layer, parameter, expert)] = fuse_pairs(parts, widths)
    return of_one_scale(fused) if fused else fused


def _stack(parts: Mapping[ModuleKey, LowRankPair], layout: BaseLayout) -> StackedPair:
    """Smaller ranks, and experts that have none, are filled up with zeros."""
    assert layout.experts is not None
    count, rank, some = layout.experts.count, max(pair.rank for pair in parts.values()), next(iter(parts.values()))
    lora_a = np.zeros((count, rank, some.lora_a.shape[1]), some.lora_a.dtype)
    lora_b = np.zeros((some.lora_b.shape[0], rank, count), some.lora_b.dtype)
    for key, pair in parts.items():
        lora_a[key.expert, : pair.rank] = pair.lora_a
        lora_b[:, : pair.rank, key.expert] = pair.lora_b
    return StackedPair(lora_a.reshape(count * rank, -1), lora_b.reshape(-1, rank * count), some.scale, count)
