"""NF4 and FP4 weights as bitsandbytes writes them to safetensors: the layout of `save_pretrained` of a 4-bit model.

For a linear `p`: `p.weight` (the codes), `p.weight.absmax`, `p.weight.quant_map`, under double quantisation also
`p.weight.nested_absmax` and `p.weight.nested_quant_map`, and `p.weight.quant_state.bitsandbytes__nf4` (or `…__fp4`), a
JSON text as bytes with what is no tensor. (bitsandbytes `QuantState.as_dict(packed=True)`.)
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from onebase_kernels import BlockwiseWeight, NestedScales
from onebase_kernels.blockwise import BLOCK_SIZE, FP4, NESTED_BLOCK_SIZE, NF4, Codebook
from onebase_server.errors import ConfigurationError

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATES = {f"quant_state.bitsandbytes__{codebook.name}": codebook for codebook in (NF4, FP4)}


def tensor_names(weight_name: str, names: Collection[str]) -> list[str]:
    """The tensors that an NF4 or FP4 weight consists of; none where the weight is in another format."""
    parts = [name for part in (*_PARTS, *_STATES) if (name := f"{weight_name}.{part}") in names]
    return [weight_name, *parts] if parts else []


def to_tensors(weight_name: str, weight: BlockwiseWeight, source_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to write for a weight that was quantised from `source_dtype`."""
    state: dict[str, Any] = {
        "quant_type": weight.codebook.name,
        "blocksize": BLOCK_SIZE,
        "dtype": _dtype_name(source_dtype),
        "shape": list(weight.shape),
    }
    parts = {"absmax": weight.absmax, "quant_map": torch.tensor(weight.codebook.values)}
    if weight.nested:
        parts |= {"nested_absmax": weight.nested.absmax, "nested_quant_map": weight.nested.quant_map.clone()}
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.nested.offset.item(),
        }
    name_of_state = next(name for name, codebook in _STATES.items() if codebook == weight.codebook)
    parts[name_of_state] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {weight_name: weight.codes.unsqueeze(1)} | {f"{weight_name}.{part}": value for part, value in parts.items()}


def from_tensors(weight_name: str, tensors: Mapping[str, Tensor]) -> BlockwiseWeight:
    """The weight that those tensors describe.

    Raises:
        ConfigurationError: a part is missing or too short, or the block sizes are not bitsandbytes' defaults.
    """
    try:
        name_of_state = next(name for name in _STATES if f"{weight_name}.{name}" in tensors)
        state = json.loads(bytes(tensors[f"{weight_name}.{name_of_state}"].tolist()))
        _refuse_other_blocks(weight_name, state)
        out_features, in_features = state["shape"]
        weight = BlockwiseWeight(
            # Some checkpoints store the codes under another dtype (`bnb_4bit_quant_storage`): the bytes are the same.
            codes=tensors[weight_name].view(torch.uint8).reshape(-1),
            absmax=tensors[f"{weight_name}.absmax"],
            shape=(out_features, in_features),
            nested=_nested(weight_name, tensors, state) if "nested_offset" in state else None,
            codebook=_STATES[name_of_state],
        )
    except (KeyError, ValueError, StopIteration) as error:
        raise ConfigurationError(f"{weight_name} is not a complete bitsandbytes 4-bit weight: {error!r}.") from error
    count = out_features * in_features
    if weight.codes.numel() != -(-count // 2) or weight.absmax.numel() != -(-count // BLOCK_SIZE):
        raise ConfigurationError(
            f"{weight_name} is not a complete bitsandbytes 4-bit weight: {count} weights in "
            f"{weight.codes.numel()} bytes with {weight.absmax.numel()} scales."
        )
    return weight


def described(config: Mapping[str, Any], codebook: Codebook, double_quant: bool) -> dict[str, Any]:
    """A `config.json` with the quantisation described as Transformers describes it."""
    return {
        **config,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": codebook.name,
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        },
    }


def _nested(weight_name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> NestedScales:
    return NestedScales(
        absmax=tensors[f"{weight_name}.nested_absmax"],
        offset=torch.tensor(state["nested_offset"]),
        quant_map=tensors[f"{weight_name}.nested_quant_map"],
    )


def _refuse_other_blocks(weight_name: str, state: Mapping[str, Any]) -> None:
    block, nested = state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK_SIZE)
    if (block, nested) != (BLOCK_SIZE, NESTED_BLOCK_SIZE):
        raise ConfigurationError(
            f"{weight_name} has quantisation blocks of {block} (nested: {nested}); "
            f"only {BLOCK_SIZE} (nested: {NESTED_BLOCK_SIZE}) are carried."
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
