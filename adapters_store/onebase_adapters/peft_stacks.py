"""LoRA on the stacked weights of a mixture's experts, as PEFT's `target_parameters` adapts them, expert by expert."""

from collections.abc import Iterator
from dataclasses import replace

from .adapter import Array, InvalidTensors
from .peft_tensors import ModuleTensors


def unstack(module: ModuleTensors) -> Iterator[ModuleTensors]:
    """Each expert's own part of a stack; any other module as it is.

    The stack's lora_A [experts · rank, in] has the rows of one expert after the other; in its lora_B
    [out, rank · experts] the experts take turns. Raises InvalidTensors if it is not of so many experts.
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
