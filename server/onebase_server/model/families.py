"""What each carried family's `config.json` means. It needs no torch; nothing but `config` asks for a family's name.

A family is one entry of FAMILIES: where it differs from Llama, by constants or by functions of its `config.json`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from onebase_server.errors import ConfigurationError
from onebase_server.model.config_reader import ConfigReader, HfConfig
from onebase_server.model.layer_config import Activation, ExpertConfig, ExpertNames, NormConfig, NormPlaces, ScaleConfig
from onebase_server.model.rope_config import RopeConfig, read_rope

Windows = tuple[int | None, ...]
Ropes = tuple[RopeConfig, tuple[RopeConfig | None, ...]]
"""The rope that states the context, and each layer's own."""

_ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj"})
_ATTENTION = _ATTENTION_INPUTS | {"o_proj"}
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


def family_of(hf: HfConfig) -> "Family":
    """The family that `model_type` names; raises ConfigurationError, with the list, where it is not carried."""
    model_type = hf.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConfigurationError(
            f"config.json: the model family {model_type!r} is not carried. Carried families: {', '.join(FAMILIES)}."
        )
    return family


# Biases: the options of config.json that give projections one.

_INPUT_BIASES: Mapping[str, frozenset[str]] = {"use_qkv_bias": _ATTENTION_INPUTS}
_ATTENTION_BIASES: Mapping[str, frozenset[str]] = {"attention_bias": _ATTENTION}
_ALL_BIASES: Mapping[str, frozenset[str]] = {**_ATTENTION_BIASES, "mlp_bias": _MLP}


# Windows: how many tokens back each layer sees.


def _no_windows(_reader: ConfigReader, num_layers: int) -> Windows:
    return (None,) * num_layers


def _windows_everywhere(reader: ConfigReader, num_layers: int) -> Windows:
    window = None if reader.hf.get("sliding_window") is None else reader.integer("sliding_window")
    return (window,) * num_layers


def _windows_if_switched_on(reader: ConfigReader, num_layers: int) -> Windows:
    """`use_sliding_window` switches windows on, `layer_types` or `max_window_layers` says in which layers."""
    hf = reader.hf
    if not hf.get("use_sliding_window") or hf.get("sliding_window") is None:
        return (None,) * num_layers
    first = hf.get("max_window_layers", 28)
    return _windows_by_layer_type(reader, num_layers, lambda layer: layer >= first)


def _windows_without_rope(reader: ConfigReader, num_layers: int) -> Windows:
    """`use_sliding_window` switches windows on, `layer_types` says where; else the layers without rope have them."""
    hf = reader.hf
    if not hf.get("use_sliding_window") or hf.get("sliding_window") is None:
        return (None,) * num_layers
    rotated = _rotated_layers(reader, num_layers)
    return _windows_by_layer_type(reader, num_layers, lambda layer: not rotated[layer])


def _alternating_windows(default_pattern: int) -> Callable[[ConfigReader, int], Windows]:
    """All layers but each `sliding_window_pattern`-th have a window, unless `layer_types` says which."""

    def windows(reader: ConfigReader, num_layers: int) -> Windows:
        pattern = reader.integer("sliding_window_pattern", default=default_pattern)
        return _windows_by_layer_type(reader, num_layers, lambda layer: (layer + 1) % pattern != 0)

    return windows


def _windows_by_layer_type(reader: ConfigReader, num_layers: int, has_window: Callable[[int], bool]) -> Windows:
    """`sliding_window` in the layers that `layer_types` names so; where there are none, in those of `has_window`."""
    window = reader.integer("sliding_window", default=4096)
    layer_types = reader.hf.get("layer_types")
    if layer_types is None:
        return tuple(window if has_window(layer) else None for layer in range(num_layers))
    if len(layer_types) != num_layers or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ConfigurationError(
            f"config.json: layer_types should name full_attention or sliding_attention for each of the {num_layers} "
            f"layers, not {layer_types!r}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


# Ropes: how each layer rotates.


def _one_rope(theta: float = 10_000.0, rotated_share: float = 1.0) -> Callable[[ConfigReader, Windows], Ropes]:
    """The same in every layer; the arguments are the family's defaults."""

    def ropes(reader: ConfigReader, windows: Windows) -> Ropes:
        rope = read_rope(reader, theta, rotated_share)
        return rope, (rope,) * len(windows)

    return ropes


def _rope_in_some_layers(reader: ConfigReader, windows: Windows) -> Ropes:
    """Layers that `no_rope_layers` marks with 0 do not rotate (NoPE, arXiv 2501.18795)."""
    rope = read_rope(reader, default_theta=2_000_000.0)
    return rope, tuple(rope if is_rotated else None for is_rotated in _rotated_layers(reader, len(windows)))


def _rotated_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    marks = reader.hf.get("no_rope_layers")
    if marks is None:
        interval = reader.integer("no_rope_layer_interval", default=4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if len(marks) != num_layers:
        raise ConfigurationError(
            f"config.json: no_rope_layers has {len(marks)} entries; each of the {num_layers} layers needs one."
        )
    return tuple(bool(mark) for mark in marks)


def _local_rope_in_windows(reader: ConfigReader, windows: Windows) -> Ropes:
    """Layers with a window have a rope of their own, which is not stretched.

    Transformers 5 nests the two under `full_attention` and `sliding_attention`; before, `rope_local_base_freq` told
    the local one. `max_position_embeddings` is the stretched context here.
    """
    hf = reader.hf
    nested = hf.get("rope_parameters") or {}
    if not isinstance(nested, Mapping) or nested.keys() - {"full_attention", "sliding_attention"}:
        raise ConfigurationError(
            "config.json: rope_parameters should have those of full_attention and those of sliding_attention, "
            f"not {nested!r}."
        )
    local_beside = {"rope_scaling": None, "rope_theta": reader.number("rope_local_base_freq", default=10_000.0)}
    whole = read_rope(ConfigReader({**hf, "rope_parameters": nested.get("full_attention")}), default_theta=1_000_000.0)
    local = read_rope(ConfigReader({**hf, **local_beside, "rope_parameters": nested.get("sliding_attention")}))
    if whole.rope_type == "linear":
        whole = replace(whole, trained_context=int(whole.trained_context / whole.factor))
    return whole, tuple(whole if window is None else local for window in windows)


# Scales.


def _plain_scales(_reader: ConfigReader, _hidden_size: int, head_dim: int) -> ScaleConfig:
    return ScaleConfig(attention=head_dim**-0.5)


def _gemma_scales(_reader: ConfigReader, hidden_size: int, head_dim: int) -> ScaleConfig:
    return ScaleConfig(attention=head_dim**-0.5, embedding=hidden_size**0.5)


def _capped_gemma_scales(reader: ConfigReader, hidden_size: int, _head_dim: int) -> ScaleConfig:
    """`query_pre_attn_scalar` stands for the head's size; a softcap that is null or left out is none."""
    return ScaleConfig(
        attention=reader.number("query_pre_attn_scalar", default=256.0) ** -0.5,
        embedding=hidden_size**0.5,
        attention_softcap=reader.optional_number("attn_logit_softcapping"),
        logits_softcap=reader.optional_number("final_logit_softcapping"),
    )


def _granite_scales(reader: ConfigReader, _hidden_size: int, _head_dim: int) -> ScaleConfig:
    embedding = reader.number("embedding_multiplier", default=1.0)
    return ScaleConfig(
        attention=reader.number("attention_multiplier", default=1.0),
        embedding=embedding,
        virtual_embedding=embedding,
        residual=reader.number("residual_multiplier", default=1.0),
        logits=1.0 / reader.number("logits_scaling", default=1.0),
    )


# Experts.


def _no_experts(_reader: ConfigReader) -> ExpertConfig | None:
    return None


def _mixtral_experts(reader: ConfigReader) -> ExpertConfig:
    return ExpertConfig(
        num_experts=reader.integer("num_local_experts", default=8),
        per_token=reader.integer("num_experts_per_tok", default=2),
        intermediate_size=reader.integer("intermediate_size"),
        is_normalized=True,
        names=ExpertNames("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    )


def _qwen3_experts(reader: ConfigReader) -> ExpertConfig:
    count_key = "num_local_experts" if reader.hf.get("num_experts") is None else "num_experts"
    return ExpertConfig(
        num_experts=reader.integer(count_key, default=128),
        per_token=reader.integer("num_experts_per_tok", default=8),
        intermediate_size=reader.integer("moe_intermediate_size", default=768),
        is_normalized=bool(reader.hf.get("norm_topk_prob")),
        names=ExpertNames(),
    )


@dataclass(frozen=True)
class Family:
    """How a family's `config.json` maps to `ModelConfig`; the defaults are Llama's."""

    always_biased: frozenset[str] = frozenset()
    """The projections that add a bias whatever `config.json` says."""
    bias_options: Mapping[str, frozenset[str]] = field(default_factory=lambda: _ALL_BIASES)
    """The options that have projections add one."""
    windows: Callable[[ConfigReader, int], Windows] = _no_windows
    ropes: Callable[[ConfigReader, Windows], Ropes] = field(default_factory=_one_rope)
    experts: Callable[[ConfigReader], ExpertConfig | None] = _no_experts
    scales: Callable[[ConfigReader, int, int], ScaleConfig] = _plain_scales
    """Of the reader, the hidden size and the head's."""
    norms: NormConfig = field(default_factory=NormConfig)
    """`eps` is what the family takes where `eps_key` is left out."""
    eps_key: str = "rms_norm_eps"
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    """What the family's names of activations stand for; the first is its default."""
    carried_options: Mapping[str, object] = field(default_factory=dict)
    """Options of which one value is carried only."""
    is_fused: bool = False
    parallel_key: str | None = None
    """The option that makes layers parallel."""
    ties_embeddings: bool = False
    """Whether the head is the embedding where `tie_word_embeddings` is left out."""
    num_kv_heads: int | None = None
    """Where it is left out; None takes the number of heads."""
    head_dim: int | None = None
    """Where it is left out; None divides the hidden size among the heads."""

    def biases(self, hf: HfConfig) -> frozenset[str]:
        """The projections that add a bias."""
        return self.always_biased.union(*(biased for option, biased in self.bias_options.items() if hf.get(option)))


_GEMMA_NORMS = NormConfig(weight_offset=1.0)
_SANDWICH_NORMS = NormConfig(
    weight_offset=1.0,
    places=NormPlaces(
        before_attention="input_layernorm",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
)
_NORMS_AFTER = NormConfig(
    eps=1e-5,
    places=NormPlaces(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    ),
    heads="together",
)
# Gemma 1 has always computed gelu's tanh form, also where its first checkpoints say "gelu".
_GEMMA_ACTIVATIONS: Mapping[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}
_CAUSAL_ONLY = {"use_bidirectional_attention": False}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(bias_options={}, windows=_windows_everywhere, num_kv_heads=8),
    "qwen2": Family(always_biased=_ATTENTION_INPUTS, bias_options={}, windows=_windows_if_switched_on, num_kv_heads=32),
    "qwen3": Family(
        bias_options=_ATTENTION_BIASES,
        windows=_windows_if_switched_on,
        norms=NormConfig(heads="each"),
        num_kv_heads=32,
        head_dim=128,
    ),
    "mixtral": Family(
        bias_options={},
        windows=_windows_everywhere,
        ropes=_one_rope(theta=1_000_000.0),
        experts=_mixtral_experts,
        norms=NormConfig(eps=1e-5),
        num_kv_heads=8,
    ),
    "qwen3_moe": Family(
        bias_options=_ATTENTION_BIASES,
        windows=_windows_if_switched_on,
        experts=_qwen3_experts,
        norms=NormConfig(heads="each"),
        carried_options={"decoder_sparse_step": 1, "mlp_only_layers": []},
        num_kv_heads=4,
    ),
    "gemma": Family(
        bias_options=_ATTENTION_BIASES,
        scales=_gemma_scales,
        norms=_GEMMA_NORMS,
        activations=_GEMMA_ACTIVATIONS,
        carried_options=_CAUSAL_ONLY,
        ties_embeddings=True,
        num_kv_heads=16,
        head_dim=256,
    ),
    "gemma2": Family(
        bias_options=_ATTENTION_BIASES,
        windows=_alternating_windows(default_pattern=2),
        scales=_capped_gemma_scales,
        norms=_SANDWICH_NORMS,
        activations=_GEMMA_ACTIVATIONS,
        carried_options=_CAUSAL_ONLY,
        ties_embeddings=True,
        num_kv_heads=4,
        head_dim=256,
    ),
    "gemma3_text": Family(
        bias_options=_ATTENTION_BIASES,
        windows=_alternating_windows(default_pattern=6),
        ropes=_local_rope_in_windows,
        scales=_capped_gemma_scales,
        norms=replace(_SANDWICH_NORMS, heads="each"),
        activations=_GEMMA_ACTIVATIONS,
        carried_options=_CAUSAL_ONLY,
        ties_embeddings=True,
        num_kv_heads=4,
        head_dim=256,
    ),
    "phi3": Family(bias_options={}, windows=_windows_everywhere, norms=NormConfig(eps=1e-5), is_fused=True),
    "smollm3": Family(windows=_windows_without_rope, ropes=_rope_in_some_layers, ties_embeddings=True, num_kv_heads=4),
    "granite": Family(scales=_granite_scales),
    "olmo2": Family(bias_options=_ATTENTION_BIASES, norms=_NORMS_AFTER),
    "stablelm": Family(
        bias_options=_INPUT_BIASES,
        ropes=_one_rope(rotated_share=0.25),
        norms=NormConfig(kind="layer", eps=1e-5),
        eps_key="layer_norm_eps",
        carried_options={"qk_layernorm": False},
        parallel_key="use_parallel_residual",
        num_kv_heads=32,
    ),
}
