"""An adapter's norms among its numbers: laid out once on the host, and found again wherever the numbers lie."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from onebase_adapters.adapter import NormVectors
from onebase_server.engine.matrix_layout import MatrixWriter, Part
from onebase_server.model.arrays import float32
from onebase_server.model.config import ModelConfig
from onebase_server.model.decoder_weights import DecoderNorms, LayerNorms
from onebase_server.model.norm import LayerNorm, Norm, RmsNorm

LAST = "norm"
"""The module of the norm before the head."""


@dataclass(frozen=True, slots=True)
class PackedNorms:
    """Where an adapter's norms lie among its numbers."""

    parts: Mapping[str, Mapping[str, Part]]
    """By module, `layers.3.input_layernorm`, then `weight` and `bias`."""

    def of(self, numbers: Tensor, base: DecoderNorms, config: ModelConfig) -> DecoderNorms:
        """The base's norms with those in the adapter's numbers, which are not copied."""
        layers = [list(norms) for norms in base.layers]
        last = base.last
        for module, parts in self.parts.items():
            vectors = {name: part.of(numbers) for name, part in parts.items()}
            if module == LAST:
                last = _replaced(last, vectors)
                continue
            _, layer, place = module.split(".", 2)
            index = config.norm_places.index(place)
            layers[int(layer)][index] = _replaced(layers[int(layer)][index], vectors)
        return DecoderNorms(tuple(LayerNorms(*norms) for norms in layers), last)


def _replaced(norm: Norm | None, vectors: Mapping[str, Tensor]) -> Norm:
    match norm:
        case RmsNorm():
            return replace(norm, weight=vectors.get("weight", norm.weight))
        case LayerNorm():
            return replace(norm, weight=vectors.get("weight", norm.weight), bias=vectors.get("bias", norm.bias))
    raise ValueError("The base has no such norm.")


def pack_norms(norms: Mapping[str, NormVectors], config: ModelConfig, writer: MatrixWriter) -> PackedNorms:
    """Put what replaces norms behind each other, with what the base's have folded in too: offset and logits' scale."""
    offsets = {"weight": config.norms.weight_offset, "bias": 0.0}
    return PackedNorms(
        {
            module: {
                name: writer.put(float32(vector) + offsets[name], scale=config.scales.logits if module == LAST else 1.0)
                for name, vector in norm.vectors.items()
            }
            for module, norm in norms.items()
        }
    )
