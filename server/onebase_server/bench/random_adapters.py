"""Random LoRA adapters for every linear of a base: they cost what real ones cost, and say nothing."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from onebase_adapters.peft_config import CONFIG_FILE
from onebase_adapters.peft_format import WEIGHTS_FILE
from onebase_server.model.config import ModelConfig
from onebase_server.model.names import linear_name

UPDATE_SIZE = 0.02
"""Standard deviation of B; small, so that answers stay numbers."""


def num_parameters(config: ModelConfig, rank: int) -> int:
    """How many numbers an adapter of this rank has."""
    return sum(rank * sum(shape) for shape in config.adapter_layout().shapes.values()) * config.num_layers


def write_random_adapter(directory: Path, config: ModelConfig, *, rank: int, seed: int) -> None:
    """Write a PEFT directory in float16; the same arguments write the same bytes."""
    rng = np.random.default_rng([seed, rank])
    shapes = config.adapter_layout().shapes
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
