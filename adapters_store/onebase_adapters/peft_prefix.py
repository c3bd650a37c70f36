"""PEFT's prompt-learning adapters to the canonical form: prefix-tuning, cartridges, prompt tuning and P-tuning.

All save one tensor, `prompt_embeddings`, with a row for each virtual token; what reparametrised it in training
(`prefix_projection`, P-tuning's encoder) is applied before saving and gone.
"""

from typing import Any

import numpy as np

from .adapter import Array, Prefix, PrefixKV, VirtualTokens
from .base_layout import BaseLayout
from .errors import InvalidConfig, InvalidTensors
from .peft_config import CONFIG_FILE, PROVENANCE, positive_integer, refuse_options_beyond

KV_TYPES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""Those whose rows are keys and values; the others' are embeddings."""

HONOURED = frozenset(
    {
        "peft_type",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "token_dim",
    }
)

WITHOUT_EFFECT = PROVENANCE | frozenset(
    {
        # how it was trained
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "init_weights",
        "num_frozen_tokens",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)
"""Options that leave the answers of a finished adapter alone."""


def read_prefix(config: dict[str, Any], tensors: dict[str, Array], layout: BaseLayout) -> Prefix:
    """Check an adapter of `peft_type` PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING or P_TUNING against the base.

    Raises:
        InvalidConfig, UnsupportedAdapter: a field of `adapter_config.json`, which the text names.
        InvalidTensors: `prompt_embeddings` is missing or does not fit, or there are other tensors.
    """
    refuse_options_beyond(HONOURED | WITHOUT_EFFECT, config)
    num_tokens = positive_integer(config.get("num_virtual_tokens"), "num_virtual_tokens")
    _require(config, "num_transformer_submodules", 1)
    _require(config, "num_layers", layout.num_layers)
    if config["peft_type"] in KV_TYPES:
        # here PEFT means the heads that K and V have, and the width of all of them
        _require(config, "num_attention_heads", layout.num_kv_heads)
        kv_width, _ = layout.shapes["k_proj"]
        _require(config, "token_dim", kv_width)
        rows = _prompt_embeddings(tensors, (num_tokens, layout.num_layers * 2 * kv_width))
        return PrefixKV(rows.reshape(num_tokens, layout.num_layers, 2, kv_width))  # as PEFT's `get_prompt` has it
    _, hidden_size = layout.shapes["q_proj"]
    _require(config, "token_dim", hidden_size)
    return VirtualTokens(_prompt_embeddings(tensors, (num_tokens, hidden_size)))


def _require(config: dict[str, Any], name: str, expected: int | None) -> None:
    """Refuse a field that says something else than what the base has; either may not say it."""
    if expected is not None and config.get(name) not in (None, expected):
        raise InvalidConfig(f"{CONFIG_FILE}: {name} is {config[name]!r}, but for this base it has to be {expected}.")


def _prompt_embeddings(tensors: dict[str, Array], shape: tuple[int, int]) -> Array:
    if set(tensors) != {"prompt_embeddings"}:
        raise InvalidTensors(f"The one tensor should be prompt_embeddings; there are: {', '.join(sorted(tensors))}.")
    rows = tensors["prompt_embeddings"]
    if rows.shape != shape:
        raise InvalidTensors(
            f"Tensor prompt_embeddings has shape {list(rows.shape)}, but this base and {CONFIG_FILE} make it "
            f"{list(shape)}."
        )
    if not np.isfinite(rows).all():
        raise InvalidTensors("Tensor prompt_embeddings holds NaN or infinite numbers.")
    return rows
