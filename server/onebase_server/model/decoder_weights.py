"""The tensors of a decoder, layer by layer, and how much memory they take. It reads no files and computes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from onebase_kernels import HeadScreen, PackedWeights
from onebase_server.model.linear import LinearGroup
from onebase_server.model.mlp import Mlp
from onebase_server.model.norm import Norm
from onebase_server.model.weight_report import QuantizationError, WeightReport


class LayerNorms(NamedTuple):
    """The norms of a layer; None where the family has none (`layer_config.NormPlaces`)."""

    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    q: Norm | None
    """Of a head's numbers, or of all heads' together, as its size says; so is `k`."""
    k: Norm | None


@dataclass(frozen=True)
class DecoderNorms:
    """All norms of a decoder."""

    layers: tuple[LayerNorms, ...]
    last: Norm
    """Before the head."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer of the base."""

    norms: LayerNorms
    qkv: LinearGroup
    o: LinearGroup
    mlp: Mlp


@dataclass(frozen=True)
class DecoderWeights:
    """All of the base."""

    embedding: Tensor
    """[vocab, hidden]."""
    layers: tuple[LayerWeights, ...]
    norm: Norm
    """The last one, before the head."""
    head: Tensor | PackedWeights
    """[vocab, hidden]; the embedding itself where the two are tied, unless it is quantised."""
    screen: HeadScreen | None = None
    """Of the head, for greedy tokens; None where it is not wanted, or the back end would gain nothing."""
    quantization_error: QuantizationError | None = None
    """Of the linears; None as in `WeightReport.error`."""

    @property
    def norms(self) -> DecoderNorms:
        """Those of all layers and the last one."""
        return DecoderNorms(tuple(layer.norms for layer in self.layers), self.norm)

    @property
    def groups(self) -> Iterator[LinearGroup]:
        """The projection groups of all layers, in the order of their places in the adapters' table."""
        for layer in self.layers:
            yield from (layer.qkv, layer.o, *layer.mlp.groups)

    def report(self) -> WeightReport:
        """What they take in memory, and what quantising them has lost."""
        norms = [self.norm, *(norm for layer in self.layers for norm in layer.norms)]
        biases = [group.bias for group in self.groups]
        head_bytes = 0 if self.head is self.embedding else self.head.nbytes
        return WeightReport(
            linear_parameters=sum(group.num_parameters for group in self.groups),
            linear_bytes=sum(group.nbytes for group in self.groups),
            embedding_bytes=self.embedding.nbytes + head_bytes,
            screen_bytes=self.screen.nbytes if self.screen else 0,
            other_bytes=sum(part.nbytes for part in (*norms, *biases) if part is not None),
            is_quantized=any(not isinstance(part, Tensor) for group in self.groups for part in group.parts),
            error=self.quantization_error,
        )
