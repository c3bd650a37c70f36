"""The tensors of the carried families in a Hugging Face checkpoint, by name and shape. It reads none of them."""

from collections.abc import Collection

from onebase_adapters.adapter import ROUTER
from onebase_server.model.config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm"
HEAD = "lm_head.weight"

_PARENT_OF = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "qkv_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "gate_up_proj": "mlp",
    "down_proj": "mlp",
}


def linear_name(config: ModelConfig, layer: int, linear: str, expert: int | None = None) -> str:
    """A linear's module: `model.layers.0.self_attn.q_proj`, `model.layers.0.mlp.experts.7.up_proj`."""
    if config.experts is not None and linear == ROUTER:
        return f"model.layers.{layer}.{config.experts.names.parent}.{ROUTER}"
    if config.experts is not None and expert is not None:
        names = config.experts.names
        return f"model.layers.{layer}.{names.parent}.experts.{expert}.{names.linears[linear]}"
    return f"model.layers.{layer}.{_PARENT_OF[linear]}.{linear}"


def norm_name(layer: int, norm: str) -> str:
    """A norm's module: `model.layers.0.input_layernorm`, `model.layers.0.self_attn.q_norm`."""
    return f"model.layers.{layer}.{norm}"


def linear_shapes(config: ModelConfig, layer: int, *, quantizable: bool = True) -> dict[str, Shape]:
    """The weights of a layer's linears, by module: of those that may be quantised, or of the others."""
    return {
        linear_name(config, layer, linear.name, group.expert): (sum(linear.widths), group.in_features)
        for group in config.projection_groups
        if group.is_quantizable == quantizable
        for linear in group.linears
    }


def layer_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """All tensors of a layer before quantisation."""
    shapes: dict[str, Shape] = {}
    for norm, size in config.layer_norms.items():
        shapes |= _norm_shapes(config, norm_name(layer, norm), size)
    for module, shape in (linear_shapes(config, layer) | linear_shapes(config, layer, quantizable=False)).items():
        shapes[f"{module}.weight"] = shape
        if module.rpartition(".")[2] in config.biases:
            shapes[f"{module}.bias"] = shape[:1]
    return shapes


def outer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All tensors that are in no layer."""
    vocab = (config.vocab_size, config.hidden_size)
    shapes: dict[str, Shape] = {EMBEDDING: vocab} | _norm_shapes(config, FINAL_NORM, config.hidden_size)
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


def _norm_shapes(config: ModelConfig, module: str, size: int) -> dict[str, Shape]:
    parts = ("weight", "bias") if config.norms.kind == "layer" else ("weight",)
    return {f"{module}.{part}": (size,) for part in parts}


def listed(names: Collection[str], limit: int = 5) -> str:
    """The first names for an error message, and how many more there are."""
    shown = sorted(names)[:limit]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
