"""int8 weights as bitsandbytes writes them to safetensors: the layout of `save_pretrained` of an 8-bit model.

For a linear `p`: `p.weight` (int8), `p.SCB` (fp32, the rows' absmax) and `p.weight_format`, which is 0 for "by rows".
(bitsandbytes `Linear8bitLt._save_to_state_dict`.)
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from onebase_kernels import Int8Weight
from onebase_server.errors import ConfigurationError

_ROW_FORMAT = 0


def tensor_names(weight_name: str, names: Collection[str]) -> list[str]:
    """The tensors that an int8 weight consists of; none where the weight is in another format."""
    absmax, layout = _part_names(weight_name)
    return [weight_name, absmax, *({layout} & set(names))] if absmax in names else []


def to_tensors(weight_name: str, weight: Int8Weight) -> dict[str, Tensor]:
    """The tensors to write."""
    absmax, layout = _part_names(weight_name)
    return {weight_name: weight.codes, absmax: weight.absmax, layout: torch.tensor(_ROW_FORMAT, dtype=torch.uint8)}


def from_tensors(weight_name: str, tensors: Mapping[str, Tensor]) -> Int8Weight:
    """The weight that those tensors describe.

    Raises:
        ConfigurationError: the codes are no int8 by rows, or there are more or fewer scales than rows.
    """
    absmax, layout = _part_names(weight_name)
    weight = Int8Weight(tensors[weight_name], tensors[absmax].float().flatten())
    if weight.codes.dtype != torch.int8 or tensors.get(layout, torch.tensor(_ROW_FORMAT)).item() != _ROW_FORMAT:
        raise ConfigurationError(f"{weight_name} is not int8 by rows, the one layout of bitsandbytes that is carried.")
    if weight.absmax.numel() != weight.shape[0]:
        raise ConfigurationError(
            f"{weight_name} is not a complete int8 weight: {weight.shape[0]} rows with {weight.absmax.numel()} scales."
        )
    return weight


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with the quantisation described as Transformers describes it."""
    return {
        **config,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    }


def _part_names(weight_name: str) -> tuple[str, str]:
    module = weight_name.removesuffix(".weight")
    return f"{module}.SCB", f"{module}.weight_format"
