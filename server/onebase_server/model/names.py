"""What the tensors of the carried families are called in a Hugging Face checkpoint. It reads none of them."""

from collections.abc import Collection, Iterator

from onebase_server.model.config import ModelConfig

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


def layer_names(config: ModelConfig, layer: int) -> list[str]:
    """All tensors of a layer before quantisation."""
    norms = ["input_layernorm", "post_attention_layernorm"] + (["q_norm", "k_norm"] if config.qk_norm else [])
    linears = linear_names(config, layer)
    return [
        *(norm_name(layer, norm) for norm in norms),
        *(f"{name}.weight" for name in linears.values()),
        *(f"{name}.bias" for projection, name in linears.items() if projection in config.biases),
    ]


def outer_names(config: ModelConfig) -> list[str]:
    """All tensors that are in no layer."""
    return [EMBEDDING, FINAL_NORM] + ([] if config.tie_word_embeddings else [HEAD])


def all_names(config: ModelConfig) -> Iterator[str]:
    """All tensors of a checkpoint before quantisation."""
    yield from outer_names(config)
    for layer in range(config.num_layers):
        yield from layer_names(config, layer)


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor may be there although nothing needs it: a tied head's copy, rope tables of old checkpoints."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tie_word_embeddings)


def listed(names: Collection[str], limit: int = 5) -> str:
    """The first names for an error message, and how many more there are."""
    shown = sorted(names)[:limit]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
