"""The canonical form to a PEFT directory: `peft_format` read backwards."""

import json
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .adapter import ROUTER, Adapter, Array, Epilogue, LowRankPair, ModuleKey, Prefix, PrefixKV
from .errors import UnsupportedAdapter
from .peft_config import CONFIG_FILE
from .peft_format import WEIGHTS_FILE
from .peft_tensors import STACKED_PARAMETERS

_STACKS = tuple(f"experts.{name}" for name in STACKED_PARAMETERS)
_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"})

Content = tuple[dict[str, object], dict[str, Array]]
"""Of the two files: the configuration, and tensors by name."""


def write_peft(adapter: Adapter, directory: Path, *, base_name: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` to a directory, which is made if it is not there.

    PEFT loads them as they are, and `parse` makes the same adapter of them. What `parse` has computed is not undone:
    VeRA and QA-LoRA come out as LoRA, (IA)³'s factors of `down_proj`'s inputs as factors of `up_proj`'s outputs, and
    fused modules as their parts (`fused_projections` makes them whole). Experts have to be stacked (`peft_stacks`).

    Raises:
        UnsupportedAdapter: none of PEFT's kinds does all that the adapter does, or it changes the vocabulary; the text
            says where.
    """
    adapter.require_exportable()
    config, tensors = _content(adapter)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config |= {"base_model_name_or_path": base_name, "task_type": "CAUSAL_LM", "inference_mode": True}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _content(adapter: Adapter) -> Content:
    if adapter.prefix is not None:
        return _prefix(adapter.prefix)
    _refuse_mixtures(adapter)
    _refuse_more_than_lora_of_parameters(adapter)
    return _lora(adapter) if adapter.pairs else _ia3(adapter)


def _refuse_mixtures(adapter: Adapter) -> None:
    """PEFT has DoRA in all modules or in none, without `lora_bias`; beside factors it has nothing."""
    dora = {"magnitude"} if any(epilogue.magnitude is not None for epilogue in adapter.epilogues.values()) else set()
    for key in sorted({*adapter.pairs, *adapter.epilogues}):
        vectors = set(adapter.epilogues.get(key, Epilogue()).vectors)
        if not adapter.pairs:
            is_carried = vectors == {"factor"}
        elif key not in adapter.pairs:
            is_carried = vectors == {"bias"}
        else:
            is_carried = vectors - {"bias"} in ([dora] if dora else [set(), {"shift"}])
        if not is_carried:
            has = " and ".join(sorted(vectors)) or "nothing but an update"
            raise UnsupportedAdapter(
                f"The adapter has {has} for {key}, which no kind of PEFT's adapters has together with the rest of it, "
                "so it cannot be exported."
            )


def _refuse_more_than_lora_of_parameters(adapter: Adapter) -> None:
    parameter = next((key for key in adapter.pairs if _is_parameter(key)), None)
    beside = {name for epilogue in adapter.epilogues.values() for name in epilogue.vectors} - {"bias"}
    if parameter and (beside or adapter.invocation_tokens):
        raise UnsupportedAdapter(
            f"The adapter changes {parameter}, a parameter to PEFT, and is DoRA, aLoRA or with a lora_bias elsewhere, "
            "which PEFT does not combine, so it cannot be exported."
        )


def _prefix(prefix: Prefix) -> Content:
    """Of the plain kind, whatever it was trained as; PEFT fills in the base's sizes."""
    peft_type = "PREFIX_TUNING" if isinstance(prefix, PrefixKV) else "PROMPT_TUNING"
    rows = np.ascontiguousarray(prefix.rows).reshape(prefix.num_tokens, -1)
    return {"peft_type": peft_type, "num_virtual_tokens": prefix.num_tokens}, {"prompt_embeddings": rows}


def _ia3(adapter: Adapter) -> Content:
    factors = {key: epilogue.vectors["factor"] for key, epilogue in adapter.epilogues.items()}
    config: dict[str, object] = {"peft_type": "IA3", "feedforward_modules": []}
    config["target_modules"] = [_module_name(key) for key in factors]
    return config, {f"{_tensor_prefix(key)}.ia3_l": factor.reshape(-1, 1) for key, factor in factors.items()}


def _lora(adapter: Adapter) -> Content:
    has = {name for epilogue in adapter.epilogues.values() for name in epilogue.vectors}
    tensors: dict[str, Array] = {}
    for key, pair in adapter.pairs.items():
        tensors[f"{_tensor_prefix(key, adapter.pairs)}.lora_A.weight"] = pair.lora_a
        tensors[f"{_tensor_prefix(key, adapter.pairs)}.lora_B.weight"] = pair.lora_b
        if "shift" in has:  # in all modules or in none
            shift = adapter.epilogues.get(key, Epilogue()).shift
            tensors[f"{_tensor_prefix(key)}.lora_B.bias"] = _lora_bias(shift, pair)
    for key, epilogue in adapter.epilogues.items():
        if epilogue.magnitude is not None:
            tensors[f"{_tensor_prefix(key)}.lora_magnitude_vector"] = epilogue.magnitude
        if epilogue.bias is not None:
            level = ".base_layer" if key in adapter.pairs else ""  # PEFT wraps what it adapts
            tensors[f"{_tensor_prefix(key)}{level}.bias"] = epilogue.bias
    config = _ranks_and_alphas({_module_name(key): pair for key, pair in adapter.pairs.items()})
    config |= {
        "peft_type": "LORA",
        "target_modules": [_module_name(key) for key in adapter.pairs if not _is_parameter(key)],
        "target_parameters": [_module_name(key) for key in adapter.pairs if _is_parameter(key)] or None,
        "bias": "all" if "bias" in has else "none",
        "use_dora": "magnitude" in has,
        "lora_bias": "shift" in has,
        "alora_invocation_tokens": list(adapter.invocation_tokens) or None,
    }
    return config, tensors


def _lora_bias(shift: Array | None, pair: LowRankPair) -> Array:
    """What PEFT multiplies with the pair's scale to get the shift."""
    if shift is None or not pair.scale:
        return np.zeros(pair.lora_b.shape[0], np.float32)
    return np.divide(shift, np.float32(pair.scale), dtype=np.float32)


def _ranks_and_alphas(pairs: Mapping[str, LowRankPair]) -> dict[str, object]:
    """The commonest rank and alpha for all, a pattern for each module that has others."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.scale * pair.rank for module, pair in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }


def _tensor_prefix(key: ModuleKey, keys: Container[ModuleKey] = ()) -> str:
    """`keys` are all that are adapted: of two stacks the first lies within the second's module."""
    module = _module_name(key)
    if _is_parameter(key):
        module = module.rpartition(".")[0]
        if key.projection == _STACKS[0] and ModuleKey(key.layer, _STACKS[1]) in keys:
            module += ".base_layer"
    return f"base_model.model.{module}"


def _module_name(key: ModuleKey) -> str:
    """Of a parameter the parameter's."""
    assert key.expert is None, f"{key} is not stacked"
    parent = "self_attn" if key.projection in _ATTENTION else "mlp"
    return f"model.layers.{key.layer}.{parent}.{key.projection}" + (".weight" if key.projection == ROUTER else "")


def _is_parameter(key: ModuleKey) -> bool:
    """Whether PEFT adapts it as a parameter, not as a module."""
    return key.projection in (ROUTER, *_STACKS)
