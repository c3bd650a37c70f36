"""A PEFT (IA)³ adapter to the canonical form (arXiv 2205.05638): outputs of linears times a learnt vector.

For feedforward modules PEFT multiplies the inputs instead. Those of `down_proj` are `act(gate) ⊙ up`, so that its
vector becomes `up_proj`'s; other inputs are shared between linears and are refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .adapter import Adapter, Array, Epilogue, ModuleKey
from .base_layout import BaseLayout
from .errors import UnsupportedAdapter
from .peft_config import PROVENANCE, refuse_options_beyond
from .peft_targets import TARGET_OPTIONS, ModuleNames, Targets
from .peft_tensors import ADAPTER_NAME, ModuleTensors, group_by_module

KNOWN_OPTIONS = PROVENANCE | TARGET_OPTIONS | {"fan_in_fan_out", "feedforward_modules", "init_ia3_weights", "peft_type"}

TENSORS = {"ia3_l": rf"ia3_l{ADAPTER_NAME}"}


def read_ia3(config: dict[str, Any], tensors: Mapping[str, Array], layout: BaseLayout) -> Adapter:
    """Check an adapter of `peft_type` IA3 against the base.

    Raises:
        InvalidConfig, UnsupportedAdapter: a field of `adapter_config.json`, which the text names.
        InvalidTensors: a tensor, which the text names, does not fit.
    """
    refuse_options_beyond(KNOWN_OPTIONS, config)
    targets, feedforward = Targets.read(config), ModuleNames.read(config, "feedforward_modules")
    factors: dict[ModuleKey, Array] = {}
    for module in group_by_module(tensors, TENSORS, layout):
        targets.require(module.name)
        if module.name in feedforward:
            parts = {module.key("up_proj"): _input_factor(module)}
        else:
            parts = dict(module.divide(module.take("ia3_l", module.out_features, 1).reshape(-1)))
        for key, factor in parts.items():  # `up_proj` may have one of its own
            factors[key] = np.multiply(factors[key], factor, dtype=np.float32) if key in factors else factor
    return Adapter({}, {key: Epilogue(factor=factor) for key, factor in factors.items()})


def _input_factor(module: ModuleTensors) -> Array:
    if module.projections != ("down_proj",):
        raise UnsupportedAdapter(
            f"feedforward_modules names {module.name}, whose input other linears share; this server multiplies the "
            "input of down_proj alone."
        )
    return module.take("ia3_l", 1, module.in_features).reshape(-1)
