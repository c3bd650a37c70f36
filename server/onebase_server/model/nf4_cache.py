"""The NF4 form of a checkpoint, kept in the cache directory as an ordinary bitsandbytes checkpoint.

It is made once, layer by layer, so that the peak of memory is one layer, and appears whole or not at all.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from onebase_kernels import quantize_nf4
from onebase_server.errors import ConfigurationError
from onebase_server.model import bnb_format
from onebase_server.model.checkpoint import INDEX_FILE, Checkpoint
from onebase_server.model.config import ModelConfig
from onebase_server.model.names import layer_shapes, linear_names, outer_shapes

FORMAT_VERSION = 1
"""Part of the fingerprint; another number makes every cached form anew."""

Progress = Callable[[int, int], None]
"""Called with how many parts are done and how many there are."""


def nf4_checkpoint(
    source: Checkpoint,
    config: ModelConfig,
    cache_dir: Path,
    double_quant: bool,
    device: torch.device,
    on_progress: Progress | None = None,
) -> Checkpoint:
    """The NF4 form of `source` in `cache_dir/nf4/<fingerprint>`, made there (computing on `device`) if it is not yet.

    Raises:
        ConfigurationError: the cache directory cannot be written.
    """
    target = cache_dir / "nf4" / _fingerprint(source, double_quant)
    if target.is_dir():
        return Checkpoint(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):  # of two servers that start together one quantises, the other waits
            if not target.is_dir():
                _build(source, config, target, double_quant, device, on_progress)
    except OSError as error:
        raise ConfigurationError(
            f"The quantised weights cannot be written to {target.parent} ({error}). "
            "Name a writable directory with enough space: --cache-dir."
        ) from error
    return Checkpoint(target)


def _build(
    source: Checkpoint,
    config: ModelConfig,
    target: Path,
    double_quant: bool,
    device: torch.device,
    on_progress: Progress | None,
) -> None:
    """Write every file beside `target`, then rename the folder into place."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # an earlier process was killed here; the lock says none is at work
    partial.mkdir()
    try:
        weight_map: dict[str, str] = {}
        total = config.num_layers + 1
        for number, tensors in enumerate(_shards(source, config, double_quant, device), start=1):
            file = f"model-{number:05}-of-{total:05}.safetensors"
            save_file(tensors, partial / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            if on_progress:
                on_progress(number, total)
        _write_json(partial / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
        _write_json(partial / "config.json", _config_json(source.directory, double_quant))
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _shards(
    source: Checkpoint, config: ModelConfig, double_quant: bool, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file to write: what is in no layer, then layer by layer."""
    yield source.read(outer_shapes(config))
    for layer in range(config.num_layers):
        tensors = source.read(layer_shapes(config, layer))
        for name in linear_names(config, layer).values():
            weight = tensors.pop(f"{name}.weight")
            quantised = quantize_nf4(weight.to(device), double_quant)
            tensors |= bnb_format.to_tensors(f"{name}.weight", quantised, weight.dtype)
        yield {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _config_json(source: Path, double_quant: bool) -> dict[str, Any]:
    """The source's `config.json`, with the quantisation described as Transformers describes it."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
    }
    return config


def _fingerprint(source: Checkpoint, double_quant: bool) -> str:
    """What the cached form depends on: the configuration, the files (path, size, time of change) and the options.

    Paths are resolved: under a hub cache that is the name of the content, whatever its times say.
    """
    files = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path in source.files for stat in [path.stat()]]
    config = (source.directory / "config.json").read_text(encoding="utf-8")
    facts = json.dumps([FORMAT_VERSION, double_quant, files, config])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
