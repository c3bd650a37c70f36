"""The canonical form to a PEFT directory: `peft_format` read backwards. Fused modules come out as their parts."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .adapter import Adapter, Array, LowRankPair, ModuleKey, Prefix, PrefixKV
from .peft_config import CONFIG_FILE
from .peft_format import WEIGHTS_FILE

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def write_peft(adapter: Adapter, directory: Path, *, base_name: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, the tensors in the dtype they have.

    `parse` makes the same adapter of them, and PEFT loads them as they are. Raises UnsupportedAdapter for an adapter
    that does more to a linear than to add an update.
    """
    adapter.require_exportable()
    if adapter.prefix is not None:
        config, tensors = _prefix_config(adapter.prefix), _prefix_tensors(adapter.prefix)
    else:
        pairs = {_module_name(key): pair for key, pair in adapter.pairs.items()}
        config, tensors = _lora_config(pairs), _lora_tensors(pairs)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config |= {"base_model_name_or_path": base_name, "task_type": "CAUSAL_LM", "inference_mode": True}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _prefix_tensors(prefix: Prefix) -> dict[str, Array]:
    return {"prompt_embeddings": np.ascontiguousarray(prefix.rows).reshape(prefix.num_tokens, -1)}


def _prefix_config(prefix: Prefix) -> dict[str, object]:
    """Of the plain kind, whatever it was trained as; PEFT fills in the base's sizes."""
    peft_type = "PREFIX_TUNING" if isinstance(prefix, PrefixKV) else "PROMPT_TUNING"
    return {"peft_type": peft_type, "num_virtual_tokens": prefix.num_tokens}


def _lora_tensors(pairs: Mapping[str, LowRankPair]) -> dict[str, Array]:
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(pair.lora_a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(pair.lora_b)
    return tensors


def _lora_config(pairs: Mapping[str, LowRankPair]) -> dict[str, object]:
    """The commonest rank and alpha for all, a pattern for each module that has others."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.scale * pair.rank for module, pair in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "bias": "none",
        "target_modules": list(pairs),
    }


def _module_name(key: ModuleKey) -> str:
    parent = "self_attn" if key.projection in _ATTENTION else "mlp"
    return f"model.layers.{key.layer}.{parent}.{key.projection}"
