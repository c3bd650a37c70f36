"""What PEFT saves of a base's norms: those that `modules_to_save` names, and the biases that `bias: all` trains."""

from collections.abc import Mapping, Sequence

import regex

from .adapter import Array, NormVectors
from .base_layout import BaseLayout
from .errors import InvalidTensors
from .peft_tensors import PEFT_LEVELS, NamedTensors

_TENSOR = regex.compile(
    rf"{PEFT_LEVELS}(?:model\.)?(?:language_model\.)?(?:model\.)?"
    r"(?P<module>norm|layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<place>[\w.]+))\.(?P<part>weight|bias)"
)


def norm_modules(layout: BaseLayout) -> list[str]:
    """The norms of the base, named as in it: `model.norm`, `model.layers.3.input_layernorm`."""
    places = [place for place in layout.norms or () if place != "norm"]
    return ["model.norm", *(f"model.layers.{layer}.{place}" for layer in range(layout.num_layers) for place in places)]


def split_norms(tensors: Mapping[str, Array], layout: BaseLayout) -> tuple[dict[str, NamedTensors], dict[str, Array]]:
    """The tensors of each norm, by its module in the model, and all others; raises InvalidTensors for one twice."""
    sizes = layout.norms or {}
    norms: dict[str, NamedTensors] = {}
    others: dict[str, Array] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match and (match["place"] or "norm") in sizes and int(match["layer"] or 0) < layout.num_layers:
            module = match["module"]
            norms.setdefault(module, NamedTensors(f"model.{module}")).add(match["part"], name, tensor)
        else:
            others[name] = tensor
    return norms, others


def read_norms(
    found: Mapping[str, NamedTensors], modules_to_save: Sequence[str], layout: BaseLayout, *, trains_bias: bool
) -> dict[str, NormVectors]:
    """What the tensors of norms are, by module.

    Raises:
        InvalidTensors: a tensor, which the text names, does not fit, or nothing in the configuration names it.
    """
    sizes = layout.norms or {}
    norms: dict[str, NormVectors] = {}
    for module, tensors in found.items():
        is_saved = any(tensors.name.endswith(name) for name in modules_to_save)
        for part, (name, _) in tensors.tensors.items():
            if part == "bias" and not layout.norms_have_bias:
                raise InvalidTensors(f"There is {name}, but the norms of this base have no bias.")
            if not is_saved and not (part == "bias" and trains_bias):
                raise InvalidTensors(f"There is {name}, but modules_to_save does not name {tensors.name}.")
        size = sizes[module if module == "norm" else module.split(".", 2)[2]]
        norms[module] = NormVectors(**{part: tensors.take(part, size) for part in tensors.tensors})
    return norms
