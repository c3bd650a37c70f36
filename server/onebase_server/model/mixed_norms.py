"""The norms of a step in which adapters replace some of the base's for their rows."""

from collections.abc import Sequence
from typing import NamedTuple

from onebase_server.model.decoder_weights import DecoderNorms, LayerNorms
from onebase_server.model.norm import LayerNorm, MixedNorm, Norm, OwnNorm, RmsNorm


class AdaptedNorms(NamedTuple):
    """All norms of rows `start:stop` of a step, of which some are the base's own."""

    start: int
    stop: int
    norms: DecoderNorms


def mix_norms(base: DecoderNorms, adapted: Sequence[AdaptedNorms]) -> DecoderNorms:
    """The base's norms, mixed with the adapters' where these have others."""
    layers = tuple(
        _mix_layer(of_layer, [of.norms.layers[layer] for of in adapted], adapted)
        for layer, of_layer in enumerate(base.layers)
    )
    return DecoderNorms(layers, _mix(base.last, [of.norms.last for of in adapted], adapted) or base.last)


def _mix_layer(base: LayerNorms, others: Sequence[LayerNorms], adapted: Sequence[AdaptedNorms]) -> LayerNorms:
    return LayerNorms(*(_mix(norm, [norms[place] for norms in others], adapted) for place, norm in enumerate(base)))


def _mix(norm: Norm | None, others: Sequence[Norm | None], adapted: Sequence[AdaptedNorms]) -> Norm | None:
    own = tuple(
        OwnNorm(of.start, of.stop, other)
        for of, other in zip(adapted, others, strict=True)
        if other is not norm and isinstance(other, RmsNorm | LayerNorm)
    )
    return MixedNorm(norm, own) if own and isinstance(norm, RmsNorm | LayerNorm) else norm
