"""A base with one adapter merged in, as an ordinary Hugging Face directory, and what rounding it has cost.

What is merged is the base as it is served: the adapter changes the weights that NF4 stands for, not those that it was
quantised from. It knows nothing of stores, and writes the directory whole or not at all.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from onebase_adapters.adapter import Adapter, Epilogue, LowRankPair, ModuleKey
from onebase_adapters.errors import UnsupportedAdapter
from onebase_kernels import BlockwiseWeight, QuantizedWeight, dequantize, quantize_nf4
from onebase_kernels.blockwise import NF4
from onebase_server.model import bnb_format, names, weight_formats
from onebase_server.model.adapted_linear import adapted_bias, adapted_weight
from onebase_server.model.arrays import float32
from onebase_server.model.checkpoint import Checkpoint
from onebase_server.model.checkpoint_writer import Progress, write_model
from onebase_server.model.config import ModelConfig
from onebase_server.model.weight_formats import FormatName
from onebase_server.model.weight_report import LinearError
from onebase_server.model.weights import check_tensors

Quantization = Literal["nf4", "none"]
Dtype = Literal["bfloat16", "float32", "float16"]


@dataclass(frozen=True)
class ExportForm:
    """What is merged, and what is written."""

    quantization: Quantization = "none"
    """Of the linears that are written."""
    dtype: Dtype = "bfloat16"
    """Of everything that is written unquantised."""
    base_quantization: FormatName | Literal["none"] = "nf4"
    """Of the base that the adapter is added to; a checkpoint that is quantised already stays as it is."""
    double_quant: bool = True
    group_size: int = 64
    """Of the base in int4."""


@dataclass(frozen=True)
class MergedError(LinearError):
    """How far a written weight is from W, the merged one in fp32."""

    update: float
    """Of what the adapter makes of the weight, less the weight."""

    @property
    def of_update(self) -> float:
        """The error as a share of the update: from 1 on, it is as large as what the adapter says."""
        return self.error / self.update if self.update else 0.0


def export_merged(
    base: Path, adapter: Adapter, output: Path, form: ExportForm, on_progress: Progress | None = None
) -> list[MergedError]:
    """Write `base` plus `adapter` to the new directory `output`; the error of each linear that the adapter touches.

    Linears that it does not touch keep their NF4 codes where the output is NF4 too.

    Where the adapter gives linears a bias that have none, those that the same option of `config.json` switches on get
    one too, of zeros.

    Raises:
        ConfigurationError: `output` exists, or the base's directory, configuration or tensors are not what is carried.
        UnsupportedAdapter: the adapter is no change of weights, or gives a bias to a linear that can have none.
    """
    adapter.require_mergeable()
    merger = _Merger(base, adapter, form)
    write_model(output, base, merger.shards(), merger.config.num_layers + 1, merger.config_json(), on_progress)
    return merger.errors


def all_together(errors: Sequence[MergedError]) -> MergedError:
    """The error of all linears as if they were one, named by how many they are."""
    return MergedError(
        f"all {len(errors)}",
        error=hypot(*(error.error for error in errors)),
        norm=hypot(*(error.norm for error in errors)),
        update=hypot(*(error.update for error in errors)),
    )


class _AdapterPart(NamedTuple):
    """What the adapter has for one projection of a linear."""

    width: int
    """Output rows."""
    pair: LowRankPair | None
    epilogue: Epilogue | None

    @property
    def changes_weight(self) -> bool:
        """Whether it does more than to add to outputs."""
        epilogue = self.epilogue
        return bool(self.pair or (epilogue and (epilogue.magnitude is not None or epilogue.factor is not None)))


class _Merger:
    """Makes the tensors to write, layer by layer."""

    def __init__(self, base: Path, adapter: Adapter, form: ExportForm) -> None:
        self.config = ModelConfig.from_directory(base)
        self.errors: list[MergedError] = []
        self._base = base
        self._checkpoint = Checkpoint(base)
        check_tensors(self._checkpoint, self.config)
        self._adapter = adapter
        self._form = form
        self._dtype: torch.dtype = getattr(torch, form.dtype)
        self._norms = {
            f"model.{module}.{part}": float32(vector)
            for module, norm in adapter.norms.items()
            for part, vector in norm.vectors.items()
        }
        self._bias_options = _needed_bias_options(adapter, self.config)
        self._biases = self.config.biases.union(*(self.config.bias_options[option] for option in self._bias_options))

    def config_json(self) -> dict[str, Any]:
        """The base's `config.json`, of what is written."""
        config: dict[str, Any] = json.loads((self._base / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = self._form.dtype
        config |= dict.fromkeys(self._bias_options, True)
        is_nf4 = self._form.quantization == "nf4"
        return bnb_format.described(config, NF4, self._form.double_quant) if is_nf4 else config

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """What is in no layer, then each layer."""
        yield self._unquantised(self._checkpoint.read(names.outer_shapes(self.config)))
        for layer in range(self.config.num_layers):
            yield self._layer(layer)

    def _layer(self, layer: int) -> dict[str, Tensor]:
        shapes = names.layer_shapes(self.config, layer)
        modules = names.linear_shapes(self.config, layer).keys()
        others = self._checkpoint.read(shapes.keys() - {f"{module}.weight" for module in modules})
        parts_of = self._adapter_parts(layer)
        for module, parts in parts_of.items():
            if module.rpartition(".")[2] in self._biases:
                others[f"{module}.bias"] = _merged_bias(others.get(f"{module}.bias"), parts)
        for module in names.linear_shapes(self.config, layer, quantizable=False):
            if any(part.changes_weight for part in parts_of[module]):
                others[f"{module}.weight"] = _merged_weight(others[f"{module}.weight"].float(), parts_of[module])
        written = self._unquantised(others)
        for module in modules:
            weight = self._read_weight(f"{module}.weight")
            if any(part.changes_weight for part in parts_of.get(module, ())):
                weight = self._merge(module, weight, parts_of[module])
            written |= self._as_tensors(f"{module}.weight", weight)
        return written

    def _adapter_parts(self, layer: int) -> dict[str, list[_AdapterPart]]:
        """What the adapter has for each projection of a layer's linears, by module."""
        pairs, epilogues = self._adapter.pairs, self._adapter.epilogues
        parts: dict[str, list[_AdapterPart]] = {}
        for group in self.config.projection_groups:
            for linear in group.linears:
                keys = [ModuleKey(layer, projection, group.expert) for projection in linear.projections]
                parts[names.linear_name(self.config, layer, linear.name, group.expert)] = [
                    _AdapterPart(width, pairs.get(key), epilogues.get(key))
                    for key, width in zip(keys, linear.widths, strict=True)
                ]
        return parts

    def _unquantised(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are written, the adapter's norms in place of the base's."""
        return {name: self._norms.get(name, tensor).to(self._dtype) for name, tensor in tensors.items()}

    def _read_weight(self, name: str) -> Tensor | QuantizedWeight:
        """A linear's weight as it is served."""
        stored = weight_formats.tensor_names(name, self._checkpoint.shapes)
        weight = weight_formats.from_tensors(name, self._checkpoint.read(stored), self.config.quantization)
        if not isinstance(weight, Tensor) or self._form.base_quantization == "none":
            return weight
        quantization = weight_formats.Quantization(
            self._form.base_quantization, self._form.double_quant, self._form.group_size
        )
        return quantization.quantize(name.removesuffix(".weight"), weight)

    def _merge(
        self, module: str, weight: Tensor | QuantizedWeight, parts: Sequence[_AdapterPart]
    ) -> Tensor | BlockwiseWeight:
        """The weight as the adapter makes it, rounded as it will be written."""
        base = _dense(weight)
        merged = _merged_weight(base, parts)
        rounded = self._rounded(merged)
        differences = (_dense(rounded) - merged, merged, merged - base)
        self.errors.append(MergedError(module, *(float(matrix.norm()) for matrix in differences)))
        return rounded

    def _rounded(self, merged: Tensor) -> Tensor | BlockwiseWeight:
        if self._form.quantization == "nf4":
            return quantize_nf4(merged, self._form.double_quant)
        return merged.to(self._dtype)

    def _as_tensors(self, name: str, weight: Tensor | QuantizedWeight) -> dict[str, Tensor]:
        if self._form.quantization == "none":
            return {name: _dense(weight).to(self._dtype)}
        if not (isinstance(weight, BlockwiseWeight) and weight.codebook == NF4):
            weight = quantize_nf4(_dense(weight), self._form.double_quant)
        return bnb_format.to_tensors(name, weight, self._dtype)


def _dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """[out, in] in fp32."""
    return weight.float() if isinstance(weight, Tensor) else dequantize(weight, torch.float32)


def _merged_weight(base: Tensor, parts: Sequence[_AdapterPart]) -> Tensor:
    """A linear's weight with the adapter, [out, in] in fp32, of the base's."""
    weights = torch.split(base, [part.width for part in parts])
    return torch.cat(
        [adapted_weight(weight, part.pair, part.epilogue) for weight, part in zip(weights, parts, strict=True)]
    )


def _merged_bias(base: Tensor | None, parts: Sequence[_AdapterPart]) -> Tensor:
    """A linear's bias with the adapter, [out] in fp32, of the base's, if it has one."""
    widths = [part.width for part in parts]
    biases = torch.split(torch.zeros(sum(widths)) if base is None else base.float(), widths)
    return torch.cat([adapted_bias(bias, part.epilogue) for bias, part in zip(biases, parts, strict=True)])


def _needed_bias_options(adapter: Adapter, config: ModelConfig) -> frozenset[str]:
    """The options of `config.json` to switch on, so that every linear that the adapter gives a bias to can have one."""
    needed = set()
    for key, epilogue in adapter.epilogues.items():
        if key.projection in config.biases or (epilogue.bias is None and epilogue.shift is None):
            continue
        option = next((name for name, biased in config.bias_options.items() if key.projection in biased), None)
        if option is None:
            raise UnsupportedAdapter(
                f"The adapter gives a bias to {key}, which has none in the base, and config.json has no option for it "
                f"in the family {config.family}: a merged checkpoint cannot hold it. Serve the adapter beside its base."
            )
        needed.add(option)
    return frozenset(needed)
