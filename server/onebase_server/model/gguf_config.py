"""From a Llama GGUF's metadata to the fields of `config.json` and `generation_config.json`.

It knows llama.cpp's key names and Hugging Face's; of the tensors it sees only the rope factors of Llama 3 files.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onebase_server.errors import ConfigurationError
from onebase_server.model.gguf_metadata import GgufMetadata

EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""The metadata keys, under `tokenizer.ggml.`, of the tokens that end a text: of all text, of a turn, of a message."""


def llama_config(
    metadata: GgufMetadata,
    *,
    vocab_size: int,
    tie_word_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
    rope_factors: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """The fields of `LlamaConfig`.

    Args:
        metadata: The file's key-value section.
        vocab_size: Rows of the embedding matrix.
        tie_word_embeddings: The file has no output matrix of its own.
        attention_bias: q, k, v and o have biases.
        mlp_bias: gate, up and down have biases.
        rope_factors: Contents of `rope_freqs.weight`, shape [head_dim / 2], if the file has it.

    Raises:
        ConfigurationError: The architecture is not Llama, or it uses something that `LlamaConfig` cannot express.
    """
    refuse_other_architectures(metadata)
    hidden_size = metadata.require("llama.embedding_length")
    num_heads = metadata.require("llama.attention.head_count")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise ConfigurationError(
                f"{metadata.path}: {key} is {metadata.get(key)}, but the heads have {head_dim} dimensions; "
                "a Llama whose parts of a head differ in size cannot be imported."
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": attention_bias,
        "attention_dropout": 0.0,
        **token_ids(metadata),
        "dtype": "bfloat16",
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": metadata.require("llama.feed_forward_length"),
        "max_position_embeddings": metadata.require("llama.context_length"),
        "mlp_bias": mlp_bias,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": metadata.require("llama.block_count"),
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "rms_norm_eps": metadata.require("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(metadata, head_dim, rope_factors),
        "tie_word_embeddings": tie_word_embeddings,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def refuse_other_architectures(metadata: GgufMetadata) -> None:
    """Raise a ConfigurationError that names the architecture unless the file holds a dense Llama."""
    if metadata.architecture != "llama":
        raise ConfigurationError(
            f"{metadata.path} holds a model of the architecture {metadata.architecture!r}; "
            "only 'llama' (Llama, Mistral, SmolLM2 and others built alike) can be imported from GGUF. "
            "Use the model's Hugging Face directory instead."
        )
    if experts := metadata.get("llama.expert_count"):
        raise ConfigurationError(
            f"{metadata.path} holds a mixture of {experts} experts; only dense Llama models can be imported."
        )


def token_ids(metadata: GgufMetadata) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (a list when several tokens end a text) and `pad_token_id`, None where unknown."""
    eos = list(dict.fromkeys(metadata.get(f"tokenizer.ggml.{key}") for key in EOS_KEYS if _has(metadata, key)))
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _has(metadata: GgufMetadata, key: str) -> bool:
    return f"tokenizer.ggml.{key}" in metadata


def _rope_parameters(metadata: GgufMetadata, head_dim: int, factors: NDArray[np.float32] | None) -> dict[str, Any]:
    theta = metadata.get("llama.rope.freq_base", 10000.0)
    if factors is not None:
        return {"rope_theta": theta, **_llama3_scaling(metadata, theta, head_dim, factors)}
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ConfigurationError(f"{metadata.path} scales its rope by {kind!r}, which cannot be imported.")
    scaling = {"rope_theta": theta, "rope_type": kind, "factor": metadata.require("llama.rope.scaling.factor")}
    if kind == "yarn":
        optional = {
            "original_max_position_embeddings": "original_context_length",
            "attention_factor": "attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        scaling |= {
            name: metadata.get(f"llama.rope.scaling.{key}")
            for name, key in optional.items()
            if f"llama.rope.scaling.{key}" in metadata
        }
    return scaling


def _llama3_scaling(
    metadata: GgufMetadata, theta: float, head_dim: int, factors: NDArray[np.float32]
) -> dict[str, Any]:
    """Recover Llama 3's four numbers from the per-frequency factors that llama.cpp keeps in their place.

    With wavelength λ and original context L: factor 1 for λ < L/high, `factor` for λ > L/low, and in between
    1 / ((1 - s) / factor + s), where s = (L/λ - low) / (high - low). So s is a straight line in 1/λ, with slope
    L / (high - low) and intercept -low / (high - low). Only the ratios of L, low and high matter; low is 1 by Llama 3's
    own convention.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    exact = factors.astype(np.float64)
    factor = round(float(exact.max()), 4)
    between = (exact > 1.0001) & (exact < 0.9999 * factor)  # the file's numbers are rounded to float32
    unknown = ConfigurationError(f"{metadata.path}: the rope factors are not those of Llama 3, the only ones known.")
    if between.sum() < 2:
        raise unknown
    smooth = (1 / exact[between] - 1 / factor) / (1 - 1 / factor)
    slope, intercept = np.polyfit(1 / wavelengths[between], smooth, 1)
    low = 1.0
    high = low - low / intercept
    original = slope * (high - low)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": round(float(high), 2),
        "original_max_position_embeddings": round(float(original)),
    }
    if not np.allclose(_llama3_factors(wavelengths, scaling), exact, rtol=1e-4):
        raise unknown
    return scaling


def _llama3_factors(wavelengths: NDArray[np.float64], scaling: dict[str, Any]) -> NDArray[np.float64]:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    factors: NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors
