"""The tensors of the carried families in a Hugging Face checkpoint, by name and shape. It reads none of them."""

from collections.abc import Collection

from onebase_server.model.config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_MODULE_OF = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def linear_names(config: ModelConfig, layer: int) -> dict[str, str]:
    """Each projection's module in a layer: `{"q_proj": "model.layers.0.self_attn.q_proj", …}`."""
    return {
        projection: f"model.layers.{layer}.{_MODULE_OF[projection]}.{projection}"
        for group in config.projection_groups
        for projection in group.projections
    }


def norm_name(layer: int, norm: str) -> str:
    """The weight of a layer's norm: `input_layernorm`, `post_attention_layernorm`, `q_norm` or `k_norm`."""
    module = "self_attn." if norm in ("q_norm", "k_norm") else ""
    return f"model.layers.{layer}.{module}{norm}.weight"


def layer_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """All tensors of a layer before quantisation."""
    shapes: dict[str, Shape] = {
        norm_name(layer, norm): (config.hidden_size,) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    if config.qk_norm:
        shapes |= {norm_name(layer, norm): (config.head_dim,) for norm in ("q_norm", "k_norm")}
    for projection, module in linear_names(config, layer).items():
        shape = config.adapter_layout().shapes[projection]
        shapes[f"{module}.weight"] = shape
        if projection in config.biases:
            shapes[f"{module}.bias"] = shape[:1]
    return shapes


def outer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All tensors that are in no layer."""
    vocab = (config.vocab_size, config.hidden_size)
    shapes: dict[str, Shape] = {EMBEDDING: vocab, FINAL_NORM: (config.hidden_size,)}
    return shapes if config.tie_word_embeddings else shapes | {HEAD: vocab}


def all_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All tensors of a checkpoint before quantisation."""
    shapes = outer_shapes(config)
    for layer in range(config.num_layers):
        shapes |= layer_shapes(config, layer)
    return shapes


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor may be there although nothing needs it: a tied head's copy, rope tables of old checkpoints."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tie_word_embeddings)


def listed(names: Collection[str], limit: int = 5) -> str:
    """The first names for an error message, and how many more there are."""
    shown = sorted(names)[:limit]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
