"""The quantised form of a checkpoint, kept in the cache directory as a checkpoint that came quantised, with its error.

It is made once, layer by layer, so that the peak of memory is one layer, and appears whole or not at all.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from onebase_kernels import QuantizedWeight, dequantize
from onebase_server.errors import ConfigurationError
from onebase_server.model import weight_formats
from onebase_server.model.checkpoint import Checkpoint
from onebase_server.model.checkpoint_writer import Progress, write_checkpoint
from onebase_server.model.config import ModelConfig
from onebase_server.model.names import layer_shapes, linear_shapes, outer_shapes
from onebase_server.model.weight_formats import Quantization
from onebase_server.model.weight_report import LinearError, write_errors

FORMAT_VERSION = 3
"""Part of the fingerprint; another number makes every cached form anew."""


def quantized_checkpoint(
    source: Checkpoint,
    config: ModelConfig,
    cache_dir: Path,
    quantization: Quantization,
    device: torch.device,
    on_progress: Progress | None = None,
) -> Checkpoint:
    """The quantised form of `source` in `cache_dir/<format>/<fingerprint>`, made there on `device` if it is not yet.

    Raises:
        ConfigurationError: the cache directory cannot be written, or a linear cannot be quantised so.
    """
    target = cache_dir / quantization.name / _fingerprint(source, quantization)
    if target.is_dir():
        return Checkpoint(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):  # of two servers that start together one quantises, the other waits
            if not target.is_dir():
                _build(source, config, target, quantization, device, on_progress)
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
    quantization: Quantization,
    device: torch.device,
    on_progress: Progress | None,
) -> None:
    """Write every file beside `target`, then rename the folder into place."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # an earlier process was killed here; the lock says none is at work
    partial.mkdir()
    try:
        errors: list[LinearError] = []
        shards = _shards(source, config, quantization, device, errors)
        write_checkpoint(
            partial, shards, config.num_layers + 1, _config_json(source.directory, quantization), on_progress
        )
        write_errors(partial, errors)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _shards(
    source: Checkpoint,
    config: ModelConfig,
    quantization: Quantization,
    device: torch.device,
    errors: list[LinearError],
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file to write: what is in no layer, then layer by layer; what is lost goes to `errors`."""
    yield source.read(outer_shapes(config))
    for layer in range(config.num_layers):
        tensors = source.read(layer_shapes(config, layer))
        for name in linear_shapes(config, layer):
            weight = tensors.pop(f"{name}.weight").to(device)
            quantised = quantization.quantize(name, weight)
            errors.append(_error(name, weight, quantised))
            tensors |= weight_formats.to_tensors(f"{name}.weight", quantised, weight.dtype)
        yield tensors


def _error(name: str, weight: Tensor, quantised: QuantizedWeight) -> LinearError:
    exact = weight.float()
    lost = dequantize(quantised, torch.float32).sub_(exact)
    return LinearError(name, float(lost.norm()), float(exact.norm()))


def _config_json(source: Path, quantization: Quantization) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return quantization.described(config)


def _fingerprint(source: Checkpoint, quantization: Quantization) -> str:
    """What the cached form depends on: the configuration, the files (path, size, time of change) and the options.

    Paths are resolved: under a hub cache that is the name of the content, whatever its times say.
    """
    files = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path in source.files for stat in [path.stat()]]
    config = (source.directory / "config.json").read_text(encoding="utf-8")
    facts = json.dumps([FORMAT_VERSION, asdict(quantization), files, config])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]
