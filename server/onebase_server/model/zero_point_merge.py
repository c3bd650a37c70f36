"""A QA-LoRA adapter folded into an int4 base, as an int4 checkpoint: codes and scales stay, each group's minimum moves.

Where A is the same for all inputs of a group, `s · B A` adds one number to an output's weights of that group, and so to
their minimum: nothing is rounded but by fp32 (arXiv 2309.14717, section 3.3). It knows nothing of stores, and writes
the directory whole or not at all.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebase_adapters.adapter import Adapter, LowRankPair, ModuleKey
from onebase_adapters.errors import UnsupportedAdapter
from onebase_kernels import Int4Weight
from onebase_server.errors import ConfigurationError
from onebase_server.model import int4_format, names, weight_formats
from onebase_server.model.arrays import float32
from onebase_server.model.checkpoint import Checkpoint
from onebase_server.model.checkpoint_writer import Progress, write_model
from onebase_server.model.config import ModelConfig, ProjectionGroup
from onebase_server.model.weight_formats import Quantization
from onebase_server.model.weights import check_tensors


def merge_into_base(
    base: Path, adapter: Adapter, output: Path, group_size: int | None = None, on_progress: Progress | None = None
) -> None:
    """Write `base` with the adapter in its minimums to the new directory `output`.

    `group_size` is that in which an unquantised base is served; one that came in int4 has its own.

    Raises:
        ConfigurationError: `output` exists, or the base's directory, configuration or tensors are not what is carried,
            or its linears are not in int4.
        UnsupportedAdapter: the adapter is more than updates of linears, or one differs within a group.
    """
    folder = _Folder(base, adapter, group_size)
    num_shards = folder.config.num_layers + 1
    write_model(output, base, folder.shards(), num_shards, folder.config_json(), on_progress)


class _Folder:
    """Makes the tensors to write, layer by layer."""

    def __init__(self, base: Path, adapter: Adapter, group_size: int | None) -> None:
        self.config = ModelConfig.from_directory(base)
        self._checkpoint = Checkpoint(base)
        check_tensors(self._checkpoint, self.config)
        _refuse_more_than_updates(adapter, self.config)
        self._adapter = adapter
        self._group_size = group_size

    def config_json(self) -> dict[str, Any]:
        """The base's, with the quantisation of what is written."""
        config = json.loads((self._checkpoint.directory / "config.json").read_text(encoding="utf-8"))
        first = next(iter(names.linear_shapes(self.config, 0)))
        return int4_format.described(config, self._read_weight(first).group_size)

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """What is in no layer, then each layer."""
        yield self._checkpoint.read(names.outer_shapes(self.config))
        for layer in range(self.config.num_layers):
            yield self._layer(layer)

    def _layer(self, layer: int) -> dict[str, Tensor]:
        modules = names.linear_shapes(self.config, layer).keys()
        weights = {module: self._read_weight(module) for module in modules}
        for group in _int4_groups(self.config):
            for linear in group.linears:
                module = names.linear_name(self.config, layer, linear.name, group.expert)
                keys = [ModuleKey(layer, projection, group.expert) for projection in linear.projections]
                weights[module] = self._shifted(weights[module], keys, linear.widths)
        others = names.layer_shapes(self.config, layer).keys() - {f"{module}.weight" for module in modules}
        written = self._checkpoint.read(others)
        for module, weight in weights.items():
            written |= int4_format.to_tensors(f"{module}.weight", weight)
        return written

    def _read_weight(self, module: str) -> Int4Weight:
        """A linear's weight as it is served; raises ConfigurationError where that is not int4."""
        name = f"{module}.weight"
        tensors = self._checkpoint.read(weight_formats.tensor_names(name, self._checkpoint.shapes))
        weight = weight_formats.from_tensors(name, tensors, self.config.quantization)
        if isinstance(weight, Tensor) and self.config.quantization is None and self._group_size is not None:
            weight = Quantization("int4", group_size=self._group_size).quantize(module, weight)
        if isinstance(weight, Int4Weight):
            return weight
        raise ConfigurationError(
            f"{module} is not in int4, which alone has minimums to fold an adapter into. For an unquantised base that "
            "is served with --quantization int4, say with which groups: --group-size."
        )

    def _shifted(self, weight: Int4Weight, keys: Sequence[ModuleKey], widths: Sequence[int]) -> Int4Weight:
        """The weight of those projections with what the adapter adds to each group's minimum."""
        pairs = [self._adapter.pairs.get(key) for key in keys]
        if not any(pairs):
            return weight
        shifts = [
            _shift(key, pair, weight.group_size) if pair else torch.zeros(width, weight.minimums.shape[1])
            for key, pair, width in zip(keys, pairs, widths, strict=True)
        ]
        return replace(weight, minimums=weight.minimums + torch.cat(shifts))


def _shift(key: ModuleKey, pair: LowRankPair, group_size: int) -> Tensor:
    """What `s · B A` adds to each group of inputs, [out, groups] in fp32."""
    lora_a = float32(pair.lora_a).view(pair.rank, -1, group_size)
    if not (lora_a == lora_a[..., :1]).all():
        raise UnsupportedAdapter(
            f"The adapter's A of {key} differs within a group of the base's {group_size} inputs, so it cannot be "
            "folded into the group's minimum. QA-LoRA with a group size that is a multiple of the base's can."
        )
    shift: Tensor = pair.scale * (float32(pair.lora_b) @ lora_a[..., 0])
    return shift


def _int4_groups(config: ModelConfig) -> Iterator[ProjectionGroup]:
    return (group for group in config.projection_groups if group.is_quantizable)


def _refuse_more_than_updates(adapter: Adapter, config: ModelConfig) -> None:
    linears = {
        ModuleKey(layer, projection, group.expert)
        for layer in range(config.num_layers)
        for group in _int4_groups(config)
        for projection in group.projections
    }
    if replace(adapter, pairs={}) != Adapter({}) or not adapter.pairs.keys() <= linears:
        raise UnsupportedAdapter(
            "The adapter is more than low-rank updates of linears that are in int4, so it cannot be folded into their "
            "minimums."
        )
