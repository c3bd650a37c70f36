"""A base model's configuration: `config.json` of a carried family as typed fields. It needs no torch.

The families differ only in the fields below; nothing after this module asks for a family's name.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from onebase_adapters.adapter import BaseLayout
from onebase_server.errors import ConfigurationError
from onebase_server.model.config_reader import ConfigReader, HfConfig
from onebase_server.model.rope_config import RopeConfig, read_rope


@dataclass(frozen=True)
class ProjectionGroup:
    """Linears computed from the same input: one call of the base, one of the side path."""

    name: str
    projections: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]
    """Output features of each projection."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """All features: the input's, then each output's."""
        return (self.in_features, *self.widths)


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder needs to know of a base model, whatever its family."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    """As `config.json` says it; `max_context` counts rope scaling in."""
    rope: RopeConfig
    tie_word_embeddings: bool
    biases: frozenset[str]
    """The projections that add a bias."""
    qk_norm: bool
    """Whether each head of q and k is normalised before rope."""
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back (itself included) a token sees; None sees all."""
    dtype: str | None = None
    """The checkpoint's dtype, `bfloat16` and the like."""
    eos_token_ids: tuple[int, ...] = ()
    is_quantized: bool = False
    """Whether the checkpoint's linears are already in bitsandbytes' NF4."""

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "ModelConfig":
        """Read `config.json` as Transformers 4 and 5 write it.

        Raises:
            ConfigurationError: the family, or an option of it, is not carried; or a field is missing or senseless.
        """
        family = _family_of(hf)
        reader = ConfigReader(hf)
        reader.refuse_unless("hidden_act", "silu")
        heads = reader.integer("num_attention_heads")
        hidden = reader.integer("hidden_size")
        layers = reader.integer("num_hidden_layers")
        config = cls(
            family=hf["model_type"],
            vocab_size=reader.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=reader.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=reader.integer("num_key_value_heads", default=family.num_kv_heads or heads),
            head_dim=reader.integer("head_dim", default=family.head_dim or hidden // heads),
            rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
            max_position_embeddings=reader.integer("max_position_embeddings"),
            rope=read_rope(reader),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            biases=family.biases(hf),
            qk_norm=family.qk_norm,
            windows=family.windows(reader, layers),
            dtype=hf.get("dtype") or hf.get("torch_dtype"),
            eos_token_ids=_token_ids(hf.get("eos_token_id")),
            is_quantized=_is_nf4(hf),
        )
        config._refuse_odd_shapes()
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Read `directory/config.json`; raises ConfigurationError as `from_hf` does, and if there is no such file."""
        path = directory / "config.json"
        try:
            hf = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigurationError(
                f"{directory} holds no config.json, so it is not a Hugging Face model directory."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(hf, dict):
            raise ConfigurationError(f"{path} should hold a JSON object, not a {type(hf).__name__}.")
        return cls.from_hf(hf)

    @cached_property
    def projection_groups(self) -> tuple[ProjectionGroup, ...]:
        """The four groups of every layer, in the order of `LoraBatch.table`."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return (
            ProjectionGroup("qkv", ("q_proj", "k_proj", "v_proj"), hidden, (q, kv, kv)),
            ProjectionGroup("o", ("o_proj",), q, (hidden,)),
            ProjectionGroup("gate_up", ("gate_proj", "up_proj"), hidden, (inner, inner)),
            ProjectionGroup("down", ("down_proj",), inner, (hidden,)),
        )

    def adapter_layout(self) -> BaseLayout:
        """What an adapter of this base has to fit."""
        shapes = {
            projection: (width, group.in_features)
            for group in self.projection_groups
            for projection, width in zip(group.projections, group.widths, strict=True)
        }
        return BaseLayout(num_layers=self.num_layers, shapes=shapes, num_kv_heads=self.num_kv_heads)

    @property
    def max_context(self) -> int:
        """The longest context the model is made for, rope scaling counted in.

        Linear and dynamic scaling stretch what `max_position_embeddings` says, yarn stretches the pretrained context;
        configurations with llama3 or longrope scaling already state the stretched length.
        """
        if self.rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":
            stretched = int(self.rope.trained_context * self.rope.factor)
            return max(stretched, self.max_position_embeddings)
        return self.max_position_embeddings

    def _refuse_odd_shapes(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigurationError(
                f"config.json: num_attention_heads ({self.num_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ConfigurationError(f"config.json: head_dim ({self.head_dim}) is odd; rope rotates pairs.")
        if self.rope.rope_type == "longrope":
            for name, factors in (("short_factor", self.rope.short_factor), ("long_factor", self.rope.long_factor)):
                if len(factors) != self.head_dim // 2:
                    raise ConfigurationError(
                        f"config.json: {name} has {len(factors)} numbers; longrope needs head_dim / 2 = "
                        f"{self.head_dim // 2}."
                    )


def _no_windows(_reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    return (None,) * num_layers


def _mistral_windows(reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    if reader.hf.get("sliding_window") is None:
        return (None,) * num_layers
    return (reader.integer("sliding_window"),) * num_layers


def _qwen_windows(reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """`use_sliding_window` switches windows on, `layer_types` or `max_window_layers` says in which layers."""
    hf = reader.hf
    if not hf.get("use_sliding_window") or hf.get("sliding_window") is None:
        return (None,) * num_layers
    window = reader.integer("sliding_window")
    layer_types = hf.get("layer_types")
    if layer_types is None:
        first = hf.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(layer_types) != num_layers or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ConfigurationError(
            f"config.json: layer_types should name full_attention or sliding_attention for each of the {num_layers} "
            f"layers, not {layer_types!r}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


_ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj"})
_ATTENTION = _ATTENTION_INPUTS | {"o_proj"}
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


def _biases_as_told(hf: HfConfig) -> frozenset[str]:
    attention = _ATTENTION if hf.get("attention_bias") else frozenset()
    return attention | (_MLP if hf.get("mlp_bias") else frozenset())


@dataclass(frozen=True)
class _Family:
    """How a family's `config.json` maps to the fields above, with the defaults that it may leave out."""

    biases: Callable[[HfConfig], frozenset[str]]
    windows: Callable[[ConfigReader, int], tuple[int | None, ...]]
    qk_norm: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None


_FAMILIES: dict[str, _Family] = {
    "llama": _Family(biases=_biases_as_told, windows=_no_windows),
    "mistral": _Family(biases=lambda _: frozenset(), windows=_mistral_windows, num_kv_heads=8),
    "qwen2": _Family(biases=lambda _: _ATTENTION_INPUTS, windows=_qwen_windows, num_kv_heads=32),
    "qwen3": _Family(
        biases=lambda hf: _ATTENTION if hf.get("attention_bias") else frozenset(),
        windows=_qwen_windows,
        qk_norm=True,
        num_kv_heads=32,
        head_dim=128,
    ),
}


def _family_of(hf: HfConfig) -> _Family:
    model_type = hf.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConfigurationError(
            f"config.json: the model family {model_type!r} is not carried. Carried families: {', '.join(_FAMILIES)}."
        )
    return family


def _is_nf4(hf: HfConfig) -> bool:
    """Whether the checkpoint is quantised; any way of it but bitsandbytes' NF4 is refused."""
    found = hf.get("quantization_config") or hf.get("compression_config")
    if not found:
        return False
    method = found.get("quant_method", "bitsandbytes" if "load_in_4bit" in found else "unknown")
    if method == "bitsandbytes":
        if found.get("load_in_4bit") and found.get("bnb_4bit_quant_type", "fp4") == "nf4":
            return True
        method += " 4-bit " + found.get("bnb_4bit_quant_type", "fp4") if found.get("load_in_4bit") else " 8-bit"
    raise ConfigurationError(
        f"config.json: the checkpoint is quantised with {method}, which is not carried. "
        "Use the unquantised checkpoint, or one quantised to NF4 by bitsandbytes."
    )


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
