"""A tiny base's configuration, and random weights and adapters for it."""

import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from onebase_adapters.adapter import Adapter, LowRankPair, ModuleKey
from onebase_adapters.blobs import write_blob
from onebase_server.engine.request import AdapterRef
from onebase_server.model.config import ModelConfig
from onebase_server.model.linear import Linear, LinearGroup

TINY = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig.from_hf(TINY)


def random_adapter(
    config: ModelConfig, ranks: dict[str, int], *, seed: int = 0, dtype: type = np.float32, scale: float = 0.7
) -> Adapter:
    """Random pairs in every layer for the given projections and ranks."""
    rng = np.random.default_rng(seed)
    shapes = config.adapter_layout().shapes

    def pair(projection: str, rank: int) -> LowRankPair:
        out_features, in_features = shapes[projection]
        return LowRankPair(
            lora_a=rng.standard_normal((rank, in_features)).astype(dtype),
            lora_b=rng.standard_normal((out_features, rank)).astype(dtype),
            scale=scale,
        )

    return Adapter(
        {
            ModuleKey(layer, projection): pair(projection, rank)
            for layer in range(config.num_layers)
            for projection, rank in ranks.items()
        }
    )


def dense_base(config: ModelConfig, *, has_bias: bool) -> list[LinearGroup]:
    """Random unquantised groups of all layers."""
    generator = torch.Generator().manual_seed(4)
    places = [group for _ in range(config.num_layers) for group in config.projection_groups]
    return [
        LinearGroup.build(
            [
                Linear(
                    torch.randn(width, group.in_features, generator=generator),
                    torch.randn(width, generator=generator) if has_bias else None,
                )
                for width in group.widths
            ],
            group.widths,
            place,
        )
        for place, group in enumerate(places)
    ]


BlobWriter = Callable[[str, dict[str, int]], AdapterRef]


@pytest.fixture
def write_adapter(tmp_path: Path, tiny_config: ModelConfig) -> BlobWriter:
    """Write the blob of a random adapter of that name."""

    def write(name: str, ranks: dict[str, int]) -> AdapterRef:
        path = tmp_path / f"{name}.safetensors"
        adapter = random_adapter(tiny_config, ranks, seed=zlib.crc32(name.encode()), dtype=ml_dtypes.bfloat16)
        return AdapterRef.of_version(digest=write_blob(adapter, path), path=str(path), label=f"{name}@1")

    return write
