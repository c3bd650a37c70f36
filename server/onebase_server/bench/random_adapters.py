"""Random LoRA adapters for the linears of a base: they cost what real ones cost, and say nothing."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from onebase_adapters.peft_config import CONFIG_FILE
from onebase_adapters.peft_format import WEIGHTS_FILE
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig
from onebase_server.model.names import linear_name

UPDATE_SIZE = 0.02
"""Standard deviation of B; small, so that answers stay numbers."""


def num_parameters(config: ModelConfig, rank: int, targets: Sequence[str] = ()) -> int:
    """How many numbers an adapter of this rank has on `targets`; raises as `write_random_adapter` does."""
    return sum(rank * sum(shape) for shape in _adapted_shapes(config, targets).values()) * config.num_layers


def write_random_adapter(
    directory: Path, config: ModelConfig, *, rank: int, seed: int, targets: Sequence[str] = ()
) -> None:
    """Write a PEFT directory in float16, for the linears that `targets` names, or all; the same arguments write the
    same bytes.

    Raises:
        ConfigurationError: The base has no linear of such a name.
    """
    rng = np.random.default_rng([seed, rank])
    shapes = _adapted_shapes(config, targets)
    tensors = {}
    for layer in range(config.num_layers):
        for projection, (rows, columns) in shapes.items():
            module = linear_name(config, layer, projection)
            lora_a = rng.standard_normal((rank, columns), dtype=np.float32) / np.sqrt(columns)
            lora_b = rng.standard_normal((rows, rank), dtype=np.float32) * UPDATE_SIZE
            tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a.astype(np.float16)
            tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b.astype(np.float16)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE)
    peft = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(shapes), "bias": "none"}
    (directory / CONFIG_FILE).write_text(json.dumps(peft))


def _adapted_shapes(config: ModelConfig, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each linear that gets an adapter."""
    shapes = config.adapter_layout().shapes
    unknown = [target for target in targets if target not in shapes]
    if unknown:
        raise ConfigurationError(f"The base has no {', '.join(unknown)} to adapt; it has {', '.join(shapes)}.")
    return {name: shape for name, shape in shapes.items() if not targets or name in targets}
