"""A model directory's weights and `config.json`, written file by file. It knows nothing of what is in them."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from onebase_server.errors import ConfigurationError
from onebase_server.model.checkpoint import INDEX_FILE
from onebase_server.model.weight_report import ERRORS_FILE

_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*")
"""What a model directory has beside its weights: the tokenizer, generation defaults, terms."""
_OF_WEIGHTS = ("config.json", INDEX_FILE, ERRORS_FILE)

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


def write_model(
    output: Path,
    base: Path,
    shards: Iterable[Mapping[str, Tensor]],
    num_shards: int,
    config: Mapping[str, Any],
    on_progress: Progress | None = None,
) -> None:
    """Write a model made of `base` to the new directory `output`, whole or not at all, with the base's other files.

    Raises:
        ConfigurationError: `output` exists.
    """
    if output.exists():
        raise ConfigurationError(f"{output} already exists; choose another directory or remove it first.")
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        write_checkpoint(unfinished, shards, num_shards, config, on_progress)
        _copy_the_rest(base, unfinished)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy_the_rest(base: Path, directory: Path) -> None:
    for pattern in _COPIED:
        for path in base.glob(pattern):
            if path.name not in _OF_WEIGHTS:
                shutil.copyfile(path, directory / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
