"""The tensors of a PEFT file, gathered by the modules of the base that they belong to.

What a tensor means is the business of its adapter's kind (`peft_lora`, `peft_ia3`, `peft_vera`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import regex

from .adapter import Array, BaseLayout, InvalidTensors, ModuleKey
from .peft_config import CONFIG_FILE

PEFT_LEVELS = r"(?:base_model\.model\.)?"
"""PeftModel's own two levels in front of a module's name."""
ADAPTER_NAME = r"(?:\.[^.]+)?"
"""The adapter's name in training, where a tool left it in."""
MODULE_NAME = (
    r"(?P<module>(?:model\.)?(?:language_model\.)?(?:model\.)?"
    r"layers\.(?P<layer>0|[1-9][0-9]{0,5})\."
    r"(?:self_attn\.(?P<projection>(?:qkv|q|k|v|o)_proj)|mlp\.(?P<projection>(?:gate_up|gate|up|down)_proj)))"
)


@dataclass
class ModuleTensors:
    """The tensors of one module of the checkpoint, which may be a fused one."""

    name: str
    """As in the base model: `model.layers.3.self_attn.q_proj`."""
    layer: int
    projections: tuple[str, ...]
    """What the module holds, in the order of its output rows; usually one."""
    widths: tuple[int, ...]
    """Output rows of each."""
    in_features: int
    tensors: dict[str, tuple[str, Array]] = field(default_factory=dict)
    """Each kind of tensor to its full name and its value."""

    @property
    def out_features(self) -> int:
        """Output rows of all projections."""
        return sum(self.widths)

    def take(self, kind: str, *shape: int) -> Array:
        """The tensor of a kind; raises InvalidTensors if it is missing, of another shape or not finite."""
        if kind not in self.tensors:
            present, _ = next(iter(self.tensors.values()))
            raise InvalidTensors(f"There is {present}, but no {kind} for {self.name}.")
        name, tensor = self.tensors[kind]
        return checked(name, tensor, shape)

    def divide(self, tensor: Array) -> Iterator[tuple[ModuleKey, Array]]:
        """A tensor's rows [out_features, …] among the projections."""
        parts = np.split(tensor, np.cumsum(self.widths)[:-1])
        for projection, part in zip(self.projections, parts, strict=True):
            yield ModuleKey(self.layer, projection), part


def checked(name: str, tensor: Array, shape: tuple[int, ...]) -> Array:
    """The tensor; raises InvalidTensors if it is of another shape or not finite."""
    if tensor.shape != shape:
        raise InvalidTensors(
            f"Tensor {name} has shape {list(tensor.shape)}, but this base and {CONFIG_FILE} make it {list(shape)}."
        )
    if not np.isfinite(tensor).all():
        raise InvalidTensors(f"Tensor {name} holds NaN or infinite numbers.")
    return tensor


def group_by_module(tensors: Mapping[str, Array], kinds: Mapping[str, str], layout: BaseLayout) -> list[ModuleTensors]:
    """Every tensor, with the others of its module.

    `kinds` maps each kind of tensor to the expression that the end of its name matches.

    Raises:
        InvalidTensors: there is no tensor at all; or one, which the text names, belongs to no linear of the base or
            is there twice.
    """
    if not tensors:
        raise InvalidTensors("The file holds no tensor, so the adapter would change nothing.")
    endings = "|".join(f"(?P<{kind}>{ending})" for kind, ending in kinds.items())
    pattern = regex.compile(rf"{PEFT_LEVELS}{MODULE_NAME}\.(?:{endings})")
    modules: dict[tuple[int, tuple[str, ...]], ModuleTensors] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        module = _module(match, layout) if match else None
        if match is None or module is None:
            raise InvalidTensors(
                f"Tensor {name} belongs to no linear of this base that adapters may touch; those are "
                f"{', '.join(layout.projections)} of layers 0 to {layout.num_layers - 1}."
            )
        module = modules.setdefault((module.layer, module.projections), module)
        kind = next(kind for kind in kinds if match[kind] is not None)
        if kind in module.tensors:
            raise InvalidTensors(f"Tensors {module.tensors[kind][0]} and {name} are for the same matrix.")
        module.tensors[kind] = (name, tensor)
    return list(modules.values())


def _module(match: "regex.Match[str]", layout: BaseLayout) -> ModuleTensors | None:
    """The module of a tensor's name; None if the base has none such."""
    layer, projection = int(match["layer"]), match["projection"]
    projections = layout.fused.get(projection, (projection,))
    if layer >= layout.num_layers or any(part not in layout.shapes for part in projections):
        return None
    return ModuleTensors(
        name=match["module"],
        layer=layer,
        projections=projections,
        widths=tuple(layout.shapes[part][0] for part in projections),
        in_features=layout.shapes[projections[0]][1],
    )
