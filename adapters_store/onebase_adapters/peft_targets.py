"""Which modules of the base an adapter's configuration names, as PEFT reads its fields.

`target_modules` less `exclude_modules`, in the layers of `layers_to_transform`. The tensors tell which modules were
adapted; what is here keeps an answer from depending on tensors that PEFT itself would not load.
"""

from dataclasses import dataclass
from typing import Any

import regex

from .errors import InvalidConfig, InvalidTensors
from .peft_config import CONFIG_FILE, compile_pattern, match_pattern

TARGET_OPTIONS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})

ANY_LIST = r"[^.]*"
"""What `layers_pattern` is when it is not given: a list of layers of any name."""


@dataclass(frozen=True)
class ModuleNames:
    """Modules, named as in the base model: `model.layers.3.self_attn.q_proj`, or by their last parts: `q_proj`."""

    names: frozenset[str] = frozenset()
    pattern: "regex.Pattern[str] | None" = None
    """Matches whole names; there is either this or `names`."""

    def __contains__(self, module: str) -> bool:
        if self.pattern is not None:
            return match_pattern(self.pattern, module) is not None
        parts = module.split(".")
        return any(".".join(parts[first:]) in self.names for first in range(len(parts)))

    @classmethod
    def read(cls, config: dict[str, Any], field: str) -> "ModuleNames":
        """A field that is a list of names or one pattern; empty if it is absent. Raises InvalidConfig."""
        value = config.get(field)
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls(pattern=compile_pattern(rf"(?:{value})\Z", field))
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return cls(frozenset(value))
        raise InvalidConfig(f"{CONFIG_FILE}: {field} should be a list of names or one pattern, not {value!r}.")


@dataclass(frozen=True)
class Targets:
    """What TARGET_OPTIONS say."""

    target_modules: ModuleNames | None
    """None where every linear is named: `all-linear`, or nothing."""
    exclude_modules: ModuleNames
    layers: frozenset[int] | None
    """None where every layer is named."""
    layer_index: tuple["regex.Pattern[str]", ...]
    """What finds a layer's number in a module's name; the first that matches counts."""

    @classmethod
    def read(cls, config: dict[str, Any]) -> "Targets":
        """Check the fields; raises InvalidConfig."""
        names = config.get("target_modules")
        is_all = names is None or (isinstance(names, str) and names.lower() == "all-linear")
        patterns = config.get("layers_pattern") or [ANY_LIST]
        if isinstance(patterns, str):
            patterns = [patterns]
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise InvalidConfig(f"{CONFIG_FILE}: layers_pattern should be a list of names, not {patterns!r}.")
        return cls(
            target_modules=None if is_all else ModuleNames.read(config, "target_modules"),
            exclude_modules=ModuleNames.read(config, "exclude_modules"),
            layers=_layers(config.get("layers_to_transform")),
            # PEFT's own expression: the first numbered part counts
            layer_index=tuple(
                compile_pattern(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", "layers_pattern") for pattern in patterns
            ),
        )

    def require(self, module: str) -> None:
        """Raise InvalidTensors if PEFT would not load tensors of this module."""
        if module in self.exclude_modules:
            raise InvalidTensors(f"There are tensors for {module}, but exclude_modules names it.")
        if self.target_modules is not None and module not in self.target_modules:
            raise InvalidTensors(f"There are tensors for {module}, but target_modules does not name it.")
        is_whole = self.target_modules is not None and module in self.target_modules.names
        if self.layers is not None and not is_whole and self._layer(module) not in self.layers:
            raise InvalidTensors(f"There are tensors for {module}, but layers_to_transform leaves its layer out.")

    def _layer(self, module: str) -> int | None:
        matches = (match_pattern(pattern, module) for pattern in self.layer_index)
        found = next((match for match in matches if match), None)
        return int(found["index"]) if found else None


def _layers(value: object) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise InvalidConfig(f"{CONFIG_FILE}: layers_to_transform should be a list of layer numbers, not {value!r}.")
    return frozenset(layers)
