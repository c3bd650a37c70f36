"""How a base stretches its rotary position embedding: what `config.json` says, as typed fields. It needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onebase_server.errors import ConfigurationError
from onebase_server.model.config_reader import ConfigReader

RopeType = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

_OLD_NAMES: Mapping[str, str] = {"su": "longrope"}
"""What the first checkpoints called a type."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and how it is stretched; `rope.py` gives each field's formula."""

    rope_type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    trained_context: int = 0
    """The context before it was stretched; every type but the default and the linear one needs it."""
    attention_factor: float | None = None
    """What cos and sin are multiplied with (yarn, longrope); None takes the paper's."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    rotated_share: float = 1.0
    """Of each head, its first numbers; the others stay as they are."""

    def rotated_dim(self, head_dim: int) -> int:
        """How many numbers of each head are rotated."""
        return int(head_dim * self.rotated_share)


def read_rope(reader: ConfigReader, default_theta: float = 10_000.0, default_share: float = 1.0) -> RopeConfig:
    """Read `rope_parameters` (Transformers 5), or `rope_theta` beside `rope_scaling` (before).

    The defaults are the family's, for a `rope_theta` or `partial_rotary_factor` that is left out.

    Raises:
        ConfigurationError: the type, or an option of it, is not carried; or a field is missing or senseless.
    """
    hf = reader.hf
    found = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise ConfigurationError("config.json: rope parameters that differ between layers are not carried.")
    beside = {key: hf.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = ConfigReader({**beside, **found})
    rope_type = found.get("rope_type", found.get("type", "default"))
    rope_type = _OLD_NAMES.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise ConfigurationError(
            f"config.json: the rope type {rope_type!r} is not carried. Carried types: {', '.join(ROPE_TYPES)}."
        )
    trained = _trained_context(reader, rope, rope_type)
    # The ratio of the two contexts says the factor where yarn or longrope leave it out.
    ratio = reader.integer("max_position_embeddings") / trained
    needs_factor = rope_type in ("linear", "dynamic", "llama3")
    return RopeConfig(
        rope_type=rope_type,
        theta=rope.number("rope_theta", default=default_theta),
        factor=rope.number("factor", default=None if needs_factor else ratio),
        trained_context=trained,
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=bool(found.get("truncate", True)),
        short_factor=tuple(found.get("short_factor") or ()),
        long_factor=tuple(found.get("long_factor") or ()),
        low_freq_factor=rope.number("low_freq_factor", default=1.0),
        high_freq_factor=rope.number("high_freq_factor", default=4.0),
        rotated_share=rope.number("partial_rotary_factor", default=default_share),
    )


def _trained_context(reader: ConfigReader, rope: ConfigReader, rope_type: str) -> int:
    """The context before it was stretched; only some types tell it apart from `max_position_embeddings`."""
    served = reader.integer("max_position_embeddings")
    if rope_type not in ("yarn", "longrope", "llama3"):
        return served
    beside = reader.hf.get("original_max_position_embeddings")
    return beside or rope.integer("original_max_position_embeddings", default=served)
