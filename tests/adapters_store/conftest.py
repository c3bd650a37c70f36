"""A tiny base, adapters for it written as PEFT writes them, and a store."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from onebase_adapters.adapter import Array
from onebase_adapters.base_layout import BaseLayout
from onebase_adapters.store import AdapterStore

LAYOUT = BaseLayout(
    num_layers=3,
    shapes={
        "q_proj": (32, 32),
        "k_proj": (16, 32),
        "v_proj": (16, 32),
        "o_proj": (32, 32),
        "gate_proj": (48, 32),
        "up_proj": (48, 32),
        "down_proj": (32, 48),
    },
    num_kv_heads=2,
    vocab_size=20,
    norms={"input_layernorm": 32, "post_attention_layernorm": 32, "norm": 32},
    is_tied=False,
)

PEFT_CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
}

Tensors = dict[str, Array]
WritePeft = Callable[..., Path]


def lora_tensors(seed: int = 0, rank: int = 4) -> Tensors:
    """q_proj and v_proj of every layer, under the names that PEFT gives them."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in range(LAYOUT.num_layers):
        for projection in ("q_proj", "v_proj"):
            rows, columns = LAYOUT.shapes[projection]
            module = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    return tensors


@pytest.fixture
def layout() -> BaseLayout:
    return LAYOUT


@pytest.fixture
def tensors() -> Tensors:
    return lora_tensors()


@pytest.fixture
def write_peft(tmp_path: Path) -> WritePeft:
    """Write a PEFT directory: `write_peft(seed=1)`, `write_peft(tensors, r=8)`; a config field of None is left out."""

    def write(tensors: Tensors | None = None, *, seed: int = 0, name: str = "peft", **config: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        options = {key: value for key, value in {**PEFT_CONFIG, **config}.items() if value is not None}
        (directory / "adapter_config.json").write_text(json.dumps(options))
        save_file(lora_tensors(seed) if tensors is None else tensors, directory / "adapter_model.safetensors")
        return directory

    return write


@pytest.fixture
def write_prefix(tmp_path: Path) -> WritePeft:
    """Write a prefix-tuning directory of five virtual tokens, or of another `peft_type`, with these rows."""

    def write(rows: Array | None = None, *, name: str = "prefix", **config: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        options = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, **config}
        (directory / "adapter_config.json").write_text(json.dumps(options))
        if rows is None:
            rows = np.random.default_rng(0).standard_normal((5, 2 * 3 * 16)).astype(np.float32)
        save_file({"prompt_embeddings": rows}, directory / "adapter_model.safetensors")
        return directory

    return write


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[[], AdapterStore]]:
    """Open the one store of this test, as often as it likes."""
    opened: list[AdapterStore] = []

    def open_() -> AdapterStore:
        opened.append(AdapterStore.open(tmp_path / "store", LAYOUT, base_name="tiny", max_rank=64))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[[], AdapterStore]) -> AdapterStore:
    return open_store()
