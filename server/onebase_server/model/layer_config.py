"""How the layers of carried families differ, as typed fields. It needs no torch and knows no family's name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Activation = Literal["silu", "gelu_tanh"]
"""Of the MLP's gate; gelu by its tanh form."""


class NormPlaces(NamedTuple):
    """Which norms a layer has around its two sublayers, by their modules' names; None where it has none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    """Of what attention has computed, before it is added to the hidden states."""
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class NormConfig:
    """A family's norms."""

    kind: Literal["rms", "layer"] = "rms"
    """RMS norm (arXiv 1910.07467), or layer norm with a bias (arXiv 1607.06450)."""
    eps: float = 1e-6
    weight_offset: float = 0.0
    """What is added to every weight; folded in at load."""
    places: NormPlaces = field(default_factory=NormPlaces)
    heads: Literal["each", "together"] | None = None
    """How q and k are normalised before rope: each head by itself, all of a token's heads as one row, or not at all."""


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the parts of a mixture of experts."""

    parent: str = "mlp"
    """The module in a layer that has the router, `gate`, and the experts, `experts.0` and so on."""
    linears: Mapping[str, str] = field(
        default_factory=lambda: {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    )
    """An expert's, by their projections."""


@dataclass(frozen=True)
class ExpertConfig:
    """Every layer's MLP as a mixture of experts."""

    num_experts: int
    per_token: int
    """How many experts compute for each token."""
    intermediate_size: int
    """Of each."""
    is_normalized: bool
    """Whether a token's weights sum to one; else they are the router's probabilities."""
    names: ExpertNames


@dataclass(frozen=True)
class ScaleConfig:
    """What a base multiplies its activations with, and where it bounds them."""

    attention: float
    """Of the scores; most families take 1 / √head_dim."""
    embedding: float = 1.0
    """Of a token's vector."""
    virtual_embedding: float = 1.0
    """Of a vector that is no token's, as adapters of virtual tokens bring them."""
    residual: float = 1.0
    """Of what each sublayer adds to the hidden states."""
    logits: float = 1.0
    """Folded into the last norm's weight at load."""
    attention_softcap: float | None = None
    """Scores become `cap · tanh(score / cap)` (arXiv 2408.00118)."""
    logits_softcap: float | None = None
