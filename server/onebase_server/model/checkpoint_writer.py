"""A model directory's weights and `config.json`, written file by file. It knows nothing of what is in them."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from onebase_server.model.checkpoint import INDEX_FILE

Progress = Callable[[int, int], None]
"""Called with how many parts are done and how many there are."""


def write_checkpoint(
    directory: Path,
    shards: Iterable[Mapping[str, Tensor]],
    num_shards: int,
    config: Mapping[str, Any],
    on_progress: Progress | None = None,
) -> None:
    """Write each shard's tensors to a safetensors file of its own, then the index and `config.json`."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{num_shards:05}.safetensors"
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        if on_progress:
            on_progress(number, num_shards)
    _write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    _write_json(directory / "config.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
