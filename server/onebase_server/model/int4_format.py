"""Group-wise int4 weights in safetensors, as Onebase itself writes them.

For a linear `p`: `p.weight` (uint8 [out, in / 2]), `p.weight.scales` (float16 [out, in / group size]) and
`p.weight.minimums` (float32, alike); `config.json` has a `quantization_config` with the `quant_method` below.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from onebase_kernels import Int4Weight
from onebase_kernels.int4 import GROUP_SIZES
from onebase_server.errors import ConfigurationError

QUANT_METHOD = "onebase_int4"

_DTYPES = {"": torch.uint8, ".scales": torch.float16, ".minimums": torch.float32}


def tensor_names(weight_name: str, names: Collection[str]) -> list[str]:
    """The tensors that an int4 weight consists of; none where the weight is in another format."""
    return [weight_name + part for part in _DTYPES] if f"{weight_name}.minimums" in names else []


def to_tensors(weight_name: str, weight: Int4Weight) -> dict[str, Tensor]:
    """The tensors to write."""
    values = (weight.codes, weight.scales, weight.minimums)
    return {weight_name + part: value for part, value in zip(_DTYPES, values, strict=True)}


def from_tensors(weight_name: str, tensors: Mapping[str, Tensor]) -> Int4Weight:
    """The weight that those tensors describe.

    Raises:
        ConfigurationError: their dtypes or shapes do not belong together.
    """
    codes, scales, minimums = parts = [tensors[weight_name + part] for part in _DTYPES]
    in_features = 2 * codes.shape[-1]
    group_size = in_features // scales.shape[-1] if scales.shape[-1] else 0
    if (
        [part.dtype for part in parts] != list(_DTYPES.values())
        or not codes.shape[0] == scales.shape[0] == minimums.shape[0]
        or scales.shape != minimums.shape
        or group_size not in GROUP_SIZES
        or group_size * scales.shape[-1] != in_features
    ):
        found = ", ".join(f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}" for part in parts)
        raise ConfigurationError(
            f"{weight_name} is not an int4 weight with groups of {', '.join(map(str, GROUP_SIZES))}: its codes, scales "
            f"and minimums are {found}."
        )
    return Int4Weight(codes, scales, minimums, (codes.shape[0], in_features), group_size)


def described(config: Mapping[str, Any], group_size: int) -> dict[str, Any]:
    """A `config.json` with the quantisation described."""
    return {**config, "quantization_config": {"quant_method": QUANT_METHOD, "group_size": group_size}}
