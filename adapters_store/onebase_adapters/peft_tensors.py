"""The tensors of a PEFT file, gathered by the modules of the base that they belong to.

What a tensor means is the business of its adapter's kind (`peft_lora`, `peft_ia3`, `peft_vera`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import regex

from .adapter import ROUTER, Array, ModuleKey
from .base_layout import BaseLayout
from .errors import InvalidTensors
from .peft_config import CONFIG_FILE
from .peft_targets import ModuleNames

PEFT_LEVELS = r"(?:base_model\.model\.)?"
"""PeftModel's own two levels in front of a module's name."""
ADAPTER_NAME = r"(?:\.[^.]+)?"
"""The adapter's name in training, where a tool left it in."""
MODULE_NAME = (
    r"(?P<module>(?:model\.)?(?:language_model\.)?(?:model\.)?"
    r"layers\.(?P<layer>0|[1-9][0-9]{0,5})\."
    r"(?:self_attn\.(?P<projection>(?:qkv|q|k|v|o)_proj)|mlp\.(?P<projection>(?:gate_up|gate|up|down)_proj)"
    rf"|(?:mlp|block_sparse_moe)\.(?:(?P<projection>{ROUTER})"
    r"|experts\.(?P<expert>0|[1-9][0-9]{0,5})\.(?P<projection>(?:gate|up|down)_proj|w[123])"
    r"|experts(?P<stack>(?:\.base_layer)?))))"
)
"""In Transformers 4 each expert has modules of its own; in 5 one module, `experts`, has all their weights in stacks."""

_MIXTRAL_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
STACKED_PARAMETERS = ("gate_up_proj", "down_proj")
"""The parameters of the module `experts`, in its order."""
_NO_NAMES = ModuleNames()


@dataclass
class NamedTensors:
    """The tensors of one module of the checkpoint."""

    name: str
    """As in the base model: `model.layers.3.self_attn.q_proj`; with the parameter, `model.layers.3.mlp.gate.weight`,
    where `target_parameters` names it."""
    tensors: dict[str, tuple[str, Array]] = field(default_factory=dict, kw_only=True)
    """Each kind of tensor to its full name and its value."""

    def add(self, kind: str, name: str, tensor: Array) -> None:
        """Gather one; raises InvalidTensors if there is one of its kind."""
        if kind in self.tensors:
            raise InvalidTensors(f"Tensors {self.tensors[kind][0]} and {name} are for the same matrix.")
        self.tensors[kind] = (name, tensor)

    def take(self, kind: str, *shape: int) -> Array:
        """The tensor of a kind; raises InvalidTensors if it is missing, of another shape or not finite."""
        if kind not in self.tensors:
            present, _ = next(iter(self.tensors.values()))
            raise InvalidTensors(f"There is {present}, but no {kind} for {self.name}.")
        name, tensor = self.tensors[kind]
        return checked(name, tensor, shape)


@dataclass
class ModuleTensors(NamedTensors):
    """Those of a linear, which may be a fused one."""

    layer: int
    expert: int | None
    """Whose it is in a mixture of experts; 0 of a stack."""
    projections: tuple[str, ...]
    """What the module holds, in the order of its output rows; usually one."""
    widths: tuple[int, ...]
    """Output rows of each."""
    in_features: int
    is_parameter: bool
    """Whether `target_parameters` names it."""
    num_stacked: int | None
    """How many experts' tensors are stacked here; None where they are one module's own."""

    @property
    def out_features(self) -> int:
        """Output rows of all projections."""
        return sum(self.widths)

    def key(self, projection: str) -> ModuleKey:
        """The linear of a projection that is the module's, or beside it."""
        return ModuleKey(self.layer, projection, self.expert)

    def divide(self, tensor: Array) -> Iterator[tuple[ModuleKey, Array]]:
        """A tensor's rows [out_features, …] among the projections."""
        parts = np.split(tensor, np.cumsum(self.widths)[:-1])
        for projection, part in zip(self.projections, parts, strict=True):
            yield self.key(projection), part


def checked(name: str, tensor: Array, shape: tuple[int, ...]) -> Array:
    """The tensor; raises InvalidTensors if it is of another shape or not finite."""
    if tensor.shape != shape:
        raise InvalidTensors(
            f"Tensor {name} has shape {list(tensor.shape)}, but this base and {CONFIG_FILE} make it {list(shape)}."
        )
    if not np.isfinite(tensor).all():
        raise InvalidTensors(f"Tensor {name} holds NaN or infinite numbers.")
    return tensor


def group_by_module(
    tensors: Mapping[str, Array],
    kinds: Mapping[str, str],
    layout: BaseLayout,
    target_parameters: ModuleNames = _NO_NAMES,
) -> list[ModuleTensors]:
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
    modules: dict[tuple[object, ...], ModuleTensors] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        module = _module(match, layout, target_parameters) if match else None
        if match is None or module is None:
            raise InvalidTensors(
                f"Tensor {name} belongs to no linear of this base that adapters may touch; those are {layout}."
            )
        module = modules.setdefault((module.layer, module.expert, module.projections, module.num_stacked), module)
        module.add(next(kind for kind in kinds if match[kind] is not None), name, tensor)
    return list(modules.values())


def _module(match: "regex.Match[str]", layout: BaseLayout, target_parameters: ModuleNames) -> ModuleTensors | None:
    """The module of a tensor's name; None if the base has none such."""
    name, projection = match["module"], _MIXTRAL_NAMES.get(match["projection"], match["projection"])
    expert = None if match["expert"] is None else int(match["expert"])
    is_parameter = f"{name}.weight" in target_parameters
    num_stacked = None
    if is_parameter:
        name = f"{name}.weight"
    elif match["stack"] is not None and layout.experts is not None:
        name, projection = _stack(match, target_parameters)
        expert, is_parameter, num_stacked = 0, True, layout.experts.count
    projections = layout.fused.get(projection, (projection,))
    shapes = [shape for part in projections if (shape := layout.shape(part, expert))]
    if int(match["layer"]) >= layout.num_layers or len(shapes) < len(projections):
        return None
    return ModuleTensors(
        name=name,
        layer=int(match["layer"]),
        expert=expert,
        projections=projections,
        widths=tuple(rows for rows, _ in shapes),
        in_features=shapes[0][1],
        is_parameter=is_parameter,
        num_stacked=num_stacked,
    )


def _stack(match: "regex.Match[str]", target_parameters: ModuleNames) -> tuple[str, str]:
    """The parameter of `experts` that the tensors belong to: its whole name, and its own.

    PEFT wraps the module once for each parameter that is named, in the module's order: the last is outermost, the one
    before it is within, as `base_layer`.
    """
    module = match["module"].removesuffix(match["stack"])
    named = [name for name in STACKED_PARAMETERS if f"{module}.{name}" in target_parameters]
    depth = 1 if match["stack"] else 0
    if depth >= len(named):
        raise InvalidTensors(
            f"There are tensors for {match['module']}, but target_parameters names "
            f"{' and '.join(named) or 'no parameter'} of {module}."
        )
    return f"{module}.{named[-1 - depth]}", named[-1 - depth]
