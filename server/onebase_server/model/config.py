"""A base model's configuration: `config.json` of a carried family as typed fields. It needs no torch.

The families differ only in the fields below; nothing after this module asks for a family's name.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from onebase_adapters.adapter import ROUTER
from onebase_adapters.base_layout import BaseLayout, ExpertLayout
from onebase_server.errors import ConfigurationError
from onebase_server.model.config_reader import ConfigReader, HfConfig
from onebase_server.model.families import family_of
from onebase_server.model.layer_config import Activation, ExpertConfig, NormConfig, NormPlaces, ScaleConfig
from onebase_server.model.quantization_config import quantization_of
from onebase_server.model.rope_config import RopeConfig


class CheckpointLinear(NamedTuple):
    """A linear as checkpoints have it: a projection, or several whose output rows follow each other."""

    name: str
    projections: tuple[str, ...]
    widths: tuple[int, ...]
    """Output features of each projection."""


@dataclass(frozen=True)
class ProjectionGroup:
    """Linears computed from the same input: one call of the base, one of the side path."""

    name: str
    projections: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]
    """Output features of each projection."""
    fused: str | None = None
    """The one linear that the checkpoint has for all projections."""
    expert: int | None = None
    """Whose it is in a mixture of experts; None for what computes for every token."""
    is_quantizable: bool = True

    @property
    def linears(self) -> tuple[CheckpointLinear, ...]:
        """What the checkpoint has of it."""
        if self.fused is not None:
            return (CheckpointLinear(self.fused, self.projections, self.widths),)
        return tuple(
            CheckpointLinear(projection, (projection,), (width,))
            for projection, width in zip(self.projections, self.widths, strict=True)
        )

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
    max_position_embeddings: int
    """As `config.json` says it; `max_context` counts rope scaling in."""
    rope: RopeConfig
    """Of the layers that see the whole context."""
    ropes: tuple[RopeConfig | None, ...]
    """Per layer; None does not rotate."""
    norms: NormConfig
    scales: ScaleConfig
    activation: Activation
    is_parallel: bool
    """Whether attention and MLP of a layer read the same normed hidden states."""
    is_fused: bool
    """Whether the checkpoint stores q, k and v as one tensor, and gate and up as another."""
    experts: ExpertConfig | None
    """None where each layer has one MLP for all tokens."""
    tie_word_embeddings: bool
    biases: frozenset[str]
    """The projections that add a bias."""
    bias_options: Mapping[str, frozenset[str]]
    """The options of `config.json` that have projections add one."""
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back (itself included) a token sees; None sees all."""
    dtype: str | None = None
    """The checkpoint's dtype, `bfloat16` and the like."""
    eos_token_ids: tuple[int, ...] = ()
    quantization: str | None = None
    """How the checkpoint's linears are quantised already: `nf4`, `fp4`, `int4` or `int8`."""

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "ModelConfig":
        """Read `config.json` as Transformers 4 and 5 write it.

        Raises:
            ConfigurationError: the family, or an option of it, is not carried; or a field is missing or senseless.
        """
        family = family_of(hf)
        reader = ConfigReader(hf)
        for option, carried in family.carried_options.items():
            reader.refuse_unless(option, carried)
        heads = reader.integer("num_attention_heads")
        hidden = reader.integer("hidden_size")
        windows = family.windows(reader, reader.integer("num_hidden_layers"))
        rope, ropes = family.ropes(reader, windows)
        head_dim = reader.integer("head_dim", default=family.head_dim or hidden // heads)
        is_parallel = family.parallel_key is not None and bool(hf.get(family.parallel_key))
        norms = replace(family.norms, eps=reader.number(family.eps_key, default=family.norms.eps))
        config = cls(
            family=hf["model_type"],
            vocab_size=reader.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=reader.integer("intermediate_size"),
            num_layers=len(windows),
            num_heads=heads,
            num_kv_heads=reader.integer("num_key_value_heads", default=family.num_kv_heads or heads),
            head_dim=head_dim,
            max_position_embeddings=reader.integer("max_position_embeddings"),
            rope=rope,
            ropes=ropes,
            norms=replace(norms, places=_PARALLEL_PLACES) if is_parallel else norms,
            scales=family.scales(reader, hidden, head_dim),
            activation=_activation(reader, family.activations),
            is_parallel=is_parallel,
            is_fused=family.is_fused,
            experts=family.experts(reader),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", family.ties_embeddings)),
            biases=family.biases(hf),
            bias_options=family.bias_options,
            windows=windows,
            dtype=hf.get("dtype") or hf.get("torch_dtype"),
            eos_token_ids=_token_ids(hf.get("eos_token_id")),
            quantization=quantization_of(hf),
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
        """The groups of every layer that adapters may touch, in the order of `LoraBatch.table`."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        fused_qkv, fused_gate_up = ("qkv_proj", "gate_up_proj") if self.is_fused else (None, None)
        attention = (
            ProjectionGroup("qkv", ("q_proj", "k_proj", "v_proj"), hidden, (q, kv, kv), fused_qkv),
            ProjectionGroup("o", ("o_proj",), q, (hidden,)),
        )
        if self.experts is not None:
            return (*attention, *_expert_groups(self.experts, hidden))
        return (
            *attention,
            ProjectionGroup("gate_up", ("gate_proj", "up_proj"), hidden, (inner, inner), fused_gate_up),
            ProjectionGroup("down", ("down_proj",), inner, (hidden,)),
        )

    @property
    def distinct_groups(self) -> tuple[ProjectionGroup, ...]:
        """Of those that may be quantised one for each name: the groups of all experts are alike."""
        return tuple({group.name: group for group in self.projection_groups if group.is_quantizable}.values())

    def adapter_layout(self) -> BaseLayout:
        """What an adapter of this base has to fit."""
        of_all = [group for group in self.projection_groups if group.expert is None and ROUTER not in group.projections]
        of_expert = [group for group in self.projection_groups if group.expert == 0]
        return BaseLayout(
            num_layers=self.num_layers,
            shapes=_shapes(of_all),
            experts=None if self.experts is None else ExpertLayout(self.experts.num_experts, _shapes(of_expert)),
            num_kv_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            is_tied=self.tie_word_embeddings,
            is_fused=self.is_fused,
            norms={**self.layer_norms, "norm": self.hidden_size},
            norms_have_bias=self.norms.kind == "layer",
        )

    @property
    def norm_places(self) -> tuple[str | None, ...]:
        """A layer's norms by module, in the order of `decoder_weights.LayerNorms`; None where it has none."""
        q_and_k = ("self_attn.q_norm", "self_attn.k_norm") if self.norms.heads else (None, None)
        return (*self.norms.places, *q_and_k)

    @property
    def layer_norms(self) -> dict[str, int]:
        """The norms of each layer, by module in it, and how many numbers each has."""
        heads = (self.num_heads, self.num_kv_heads) if self.norms.heads == "together" else (1, 1)
        sizes = (*[self.hidden_size] * len(self.norms.places), *(count * self.head_dim for count in heads))
        return {norm: size for norm, size in zip(self.norm_places, sizes, strict=True) if norm is not None}

    @property
    def max_context(self) -> int:
        """The longest context the model is made for, rope scaling counted in.

        Linear and dynamic scaling stretch what `max_position_embeddings` says, yarn stretches the pretrained context;
        configurations with llama3 or longrope scaling already state the stretched length.
        """
        if self.rope.rope_type in ("linear", "dynamic"):
            return int(self.rope.trained_context * self.rope.factor)
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
        rotated = self.rope.rotated_dim(self.head_dim)
        if rotated % 2:
            raise ConfigurationError(
                f"config.json: {rotated} of a head's {self.head_dim} numbers would be rotated; rope rotates pairs."
            )
        if self.rope.rope_type == "longrope":
            for name, factors in (("short_factor", self.rope.short_factor), ("long_factor", self.rope.long_factor)):
                if len(factors) != rotated // 2:
                    raise ConfigurationError(
                        f"config.json: {name} has {len(factors)} numbers; longrope needs one for each of the "
                        f"{rotated // 2} pairs that it rotates."
                    )


def _expert_groups(config: ExpertConfig, hidden: int) -> Iterator[ProjectionGroup]:
    """The router, then those of each expert."""
    inner = config.intermediate_size
    yield ProjectionGroup("router", (ROUTER,), hidden, (config.num_experts,), is_quantizable=False)
    for expert in range(config.num_experts):
        yield ProjectionGroup("gate_up", ("gate_proj", "up_proj"), hidden, (inner, inner), expert=expert)
        yield ProjectionGroup("down", ("down_proj",), inner, (hidden,), expert=expert)


def _shapes(groups: Iterable[ProjectionGroup]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each projection."""
    return {
        projection: (width, group.in_features)
        for group in groups
        for projection, width in zip(group.projections, group.widths, strict=True)
    }


_PARALLEL_PLACES = NormPlaces(before_mlp=None)


def _activation(reader: ConfigReader, carried: Mapping[str, Activation]) -> Activation:
    """`hidden_activation` (Gemma) or `hidden_act`, as the family means it."""
    key = "hidden_act" if reader.hf.get("hidden_activation") is None else "hidden_activation"
    name = reader.hf.get(key) or next(iter(carried))
    if name not in carried:
        raise ConfigurationError(
            f"config.json: {key} = {name!r} is not carried; only {', '.join(map(repr, carried))} is."
        )
    return carried[name]


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
