"""A base with one LoRA adapter merged in, as an ordinary Hugging Face directory, and what rounding it has cost.

What is merged is the base as it is served: the adapter is added to the weights that NF4 stands for, not to those that
it was quantised from. It knows nothing of stores, and writes the directory whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from onebase_adapters.adapter import Adapter, LowRankPair, ModuleKey
from onebase_kernels import Nf4Weight, dequantize_nf4, quantize_nf4
from onebase_server.errors import ConfigurationError
from onebase_server.model import bnb_format, names
from onebase_server.model.arrays import float32
from onebase_server.model.checkpoint import INDEX_FILE, Checkpoint
from onebase_server.model.checkpoint_writer import Progress, write_checkpoint
from onebase_server.model.config import ModelConfig
from onebase_server.model.weights import check_tensors

Quantization = Literal["nf4", "none"]
Dtype = Literal["bfloat16", "float32", "float16"]

_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*")
"""What a model directory has beside its weights: the tokenizer, generation defaults, terms."""
_WRITTEN = ("config.json", INDEX_FILE)


@dataclass(frozen=True)
class ExportForm:
    """What is merged, and what is written."""

    quantization: Quantization = "none"
    """Of the linears that are written."""
    dtype: Dtype = "bfloat16"
    """Of everything that is written unquantised."""
    base_quantization: Quantization = "nf4"
    """Of the base that the adapter is added to; a checkpoint that is quantised already stays as it is."""
    double_quant: bool = True


@dataclass(frozen=True)
class LinearError:
    """How far a written weight is from base plus update in fp32; Frobenius norms."""

    name: str
    """The linear's module, `model.layers.0.self_attn.q_proj`."""
    error: float
    merged: float
    """Of base plus update."""
    update: float
    """Of the update alone."""

    @property
    def relative(self) -> float:
        """The error as a share of the weight."""
        return self.error / self.merged if self.merged else 0.0

    @property
    def of_update(self) -> float:
        """The error as a share of the update: from 1 on, it is as large as what the adapter says."""
        return self.error / self.update if self.update else 0.0


def export_merged(
    base: Path, adapter: Adapter, output: Path, form: ExportForm, on_progress: Progress | None = None
) -> list[LinearError]:
    """Write `base` plus `adapter` to the new directory `output`; the error of each linear that the adapter touches.

    Linears that it does not touch keep their NF4 codes where the output is NF4 too.

    Raises:
        ConfigurationError: `output` exists, or the base's directory, configuration or tensors are not what is carried.
        UnsupportedAdapter: the adapter does more to a linear than to add an update.
    """
    adapter.require_exportable()
    if output.exists():
        raise ConfigurationError(f"{output} already exists; choose another directory or remove it first.")
    merger = _Merger(base, adapter, form)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        write_checkpoint(
            unfinished, merger.shards(), merger.config.num_layers + 1, _config_json(base, form), on_progress
        )
        _copy_the_rest(base, unfinished)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return merger.errors


class _Merger:
    """Makes the tensors to write, layer by layer."""

    def __init__(self, base: Path, adapter: Adapter, form: ExportForm) -> None:
        self.config = ModelConfig.from_directory(base)
        self.errors: list[LinearError] = []
        self._checkpoint = Checkpoint(base)
        check_tensors(self._checkpoint, self.config)
        self._adapter = adapter
        self._form = form
        self._dtype: torch.dtype = getattr(torch, form.dtype)

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """What is in no layer, then each layer."""
        yield self._unchanged(self._checkpoint.read(names.outer_shapes(self.config)))
        for layer in range(self.config.num_layers):
            yield self._layer(layer)

    def _layer(self, layer: int) -> dict[str, Tensor]:
        shapes = names.layer_shapes(self.config, layer)
        modules = names.linear_shapes(self.config, layer).keys()
        updates = self._updates(layer)
        written = self._unchanged(self._checkpoint.read(shapes.keys() - {f"{module}.weight" for module in modules}))
        for module in modules:
            weight = self._read_weight(f"{module}.weight")
            if module in updates:
                weight = self._merge(module, weight, updates[module])
            written |= self._as_tensors(f"{module}.weight", weight)
        return written

    def _updates(self, layer: int) -> dict[str, Tensor]:
        """What the adapter adds to a layer's linears, [out, in] in fp32 by module."""
        updates: dict[str, Tensor] = {}
        for group in self.config.projection_groups:
            for linear in group.linears:
                pairs = [self._adapter.pairs.get(ModuleKey(layer, projection)) for projection in linear.projections]
                if any(pairs):
                    parts = zip(pairs, linear.widths, strict=True)
                    updates[names.linear_name(layer, linear.name)] = torch.cat(
                        [_update(pair) if pair else torch.zeros(width, group.in_features) for pair, width in parts]
                    )
        return updates

    def _unchanged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._dtype) for name, tensor in tensors.items()}

    def _read_weight(self, name: str) -> Tensor | Nf4Weight:
        """A linear's weight as it is served."""
        parts = bnb_format.nf4_part_names(name, self._checkpoint.shapes)
        tensors = self._checkpoint.read([name, *parts])
        if parts:
            return bnb_format.from_tensors(name, tensors)
        if self._form.base_quantization == "nf4":
            return quantize_nf4(tensors[name], self._form.double_quant)
        return tensors[name]

    def _merge(self, module: str, weight: Tensor | Nf4Weight, update: Tensor) -> Tensor | Nf4Weight:
        """Base plus update, rounded as it will be written."""
        merged = _dense(weight) + update
        rounded = self._rounded(merged)
        error = _dense(rounded) - merged
        self.errors.append(LinearError(module, *(float(matrix.norm()) for matrix in (error, merged, update))))
        return rounded

    def _rounded(self, merged: Tensor) -> Tensor | Nf4Weight:
        if self._form.quantization == "nf4":
            return quantize_nf4(merged, self._form.double_quant)
        return merged.to(self._dtype)

    def _as_tensors(self, name: str, weight: Tensor | Nf4Weight) -> dict[str, Tensor]:
        if self._form.quantization == "none":
            return {name: _dense(weight).to(self._dtype)}
        quantised = weight if isinstance(weight, Nf4Weight) else quantize_nf4(weight, self._form.double_quant)
        return bnb_format.to_tensors(name, quantised, self._dtype)


def _dense(weight: Tensor | Nf4Weight) -> Tensor:
    """[out, in] in fp32."""
    return weight.float() if isinstance(weight, Tensor) else dequantize_nf4(weight, torch.float32)


def _update(pair: LowRankPair) -> Tensor:
    """`s · B A` in fp32, [out, in]."""
    return pair.scale * (float32(pair.lora_b) @ float32(pair.lora_a))


def _config_json(base: Path, form: ExportForm) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = form.dtype
    return bnb_format.described_as_nf4(config, form.double_quant) if form.quantization == "nf4" else config


def _copy_the_rest(base: Path, directory: Path) -> None:
    for pattern in _COPIED:
        for path in base.glob(pattern):
            if path.name not in _WRITTEN:
                shutil.copyfile(path, directory / path.name)
