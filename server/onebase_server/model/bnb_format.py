"""NF4 weights as bitsandbytes writes them to safetensors: the layout of `save_pretrained` of a 4-bit model.

For a linear `p`: `p.weight` (the codes), `p.weight.absmax`, `p.weight.quant_map`, under double quantisation also
`p.weight.nested_absmax` and `p.weight.nested_quant_map`, and `p.weight.quant_state.bitsandbytes__nf4`, a JSON text as
bytes with what is no tensor. (bitsandbytes `QuantState.as_dict(packed=True)`.)
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from onebase_kernels import NestedScales, Nf4Weight
from onebase_kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4_VALUES
from onebase_server.errors import ConfigurationError

_STATE = "quant_state.bitsandbytes__nf4"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE)


def nf4_part_names(weight_name: str, names: Collection[str]) -> list[str]:
    """The tensors beside `weight_name` that make it an NF4 weight; none where it is not quantised.

    Raises:
        ConfigurationError: it is quantised to FP4.
    """
    if f"{weight_name}.quant_state.bitsandbytes__fp4" in names:
        raise ConfigurationError(f"{weight_name} is quantised to FP4, which is not carried; NF4 is.")
    return [name for part in _PARTS if (name := f"{weight_name}.{part}") in names]


def to_tensors(weight_name: str, weight: Nf4Weight, source_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to write for a weight that was quantised from `source_dtype`."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": _dtype_name(source_dtype),
        "shape": list(weight.shape),
    }
    parts = {"absmax": weight.absmax, "quant_map": torch.tensor(NF4_VALUES)}
    if weight.nested:
        parts |= {"nested_absmax": weight.nested.absmax, "nested_quant_map": weight.nested.quant_map.clone()}
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.nested.offset.item(),
        }
    parts[_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {weight_name: weight.codes.unsqueeze(1)} | {f"{weight_name}.{part}": value for part, value in parts.items()}


def from_tensors(weight_name: str, tensors: Mapping[str, Tensor]) -> Nf4Weight:
    """The weight that those tensors describe.

    Raises:
        ConfigurationError: a part is missing or too short, or the block sizes are not bitsandbytes' defaults.
    """
    try:
        state = json.loads(bytes(tensors[f"{weight_name}.{_STATE}"].tolist()))
        _refuse_other_blocks(weight_name, state)
        out_features, in_features = state["shape"]
        weight = Nf4Weight(
            # Some checkpoints store the codes under another dtype (`bnb_4bit_quant_storage`): the bytes are the same.
            codes=tensors[weight_name].view(torch.uint8).reshape(-1),
            absmax=tensors[f"{weight_name}.absmax"],
            shape=(out_features, in_features),
            nested=_nested(weight_name, tensors, state) if "nested_offset" in state else None,
        )
    except (KeyError, ValueError) as error:
        raise ConfigurationError(f"{weight_name} is not a complete bitsandbytes NF4 weight: {error!r}.") from error
    count = out_features * in_features
    if weight.codes.numel() != -(-count // 2) or weight.absmax.numel() != -(-count // BLOCK_SIZE):
        raise ConfigurationError(
            f"{weight_name} is not a complete bitsandbytes NF4 weight: {count} weights in {weight.codes.numel()} bytes "
            f"with {weight.absmax.numel()} scales."
        )
    return weight


def described_as_nf4(config: Mapping[str, Any], double_quant: bool) -> dict[str, Any]:
    """A `config.json` with the quantisation described as Transformers describes it."""
    return {
        **config,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
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
