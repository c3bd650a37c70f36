"""The formats in which linears are kept: which tensors of a checkpoint are a weight, how to read, write and make one.

Whatever reads or writes weights goes through here and asks for no format by name.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from onebase_kernels import (
    BlockwiseWeight,
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    quantize_fp4,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)
from onebase_kernels.blockwise import FP4, NF4
from onebase_server.errors import ConfigurationError
from onebase_server.model import bnb_format, int4_format, int8_format, packed_int4_format
from onebase_server.settings import EngineSettings

FormatName = Literal["nf4", "fp4", "int4", "int8"]


class _Format(Protocol):
    """What the module of a format knows."""

    def tensor_names(self, weight_name: str, names: Collection[str]) -> list[str]:
        """The tensors that a weight consists of; none where it is in another format."""


class _Reader(_Format, Protocol):
    """What it reads with, where the tensors alone say what they are."""

    def from_tensors(self, weight_name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The weight that those tensors describe; raises ConfigurationError where they are not a whole one."""


_READERS: tuple[_Reader, ...] = (bnb_format, int4_format, int8_format)
_FORMATS: tuple[_Format, ...] = (*_READERS, packed_int4_format)


def tensor_names(weight_name: str, names: Collection[str]) -> list[str]:
    """The tensors that a weight consists of among those of a checkpoint; itself, where it is not quantised."""
    found = (format_.tensor_names(weight_name, names) for format_ in _FORMATS)
    return next(filter(None, found), [weight_name])


def from_tensors(weight_name: str, tensors: Mapping[str, Tensor], quantization: str | None) -> QuantizedWeight | Tensor:
    """The weight that those tensors are; raises ConfigurationError where they are not a whole one of their format.

    `quantization` is what `config.json` says: GPTQ's and AWQ's tensors have the same names, and not all have shapes of
    their own.
    """
    if packed_int4_format.tensor_names(weight_name, tensors):
        return packed_int4_format.from_tensors(weight_name, tensors, quantization)
    for reader in _READERS:
        if reader.tensor_names(weight_name, tensors):
            return reader.from_tensors(weight_name, tensors)
    return tensors[weight_name]


def to_tensors(weight_name: str, weight: QuantizedWeight, source_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to write for a weight that was quantised from `source_dtype`."""
    match weight:
        case BlockwiseWeight():
            return bnb_format.to_tensors(weight_name, weight, source_dtype)
        case Int4Weight():
            return int4_format.to_tensors(weight_name, weight)
        case Int8Weight():
            return int8_format.to_tensors(weight_name, weight)


@dataclass(frozen=True)
class Quantization:
    """How linears are to be quantised."""

    name: FormatName
    double_quant: bool = True
    """Of nf4 and fp4."""
    group_size: int = 64
    """Of int4."""

    @classmethod
    def of(cls, settings: EngineSettings) -> "Quantization | None":
        """As settings say; None where linears are to be left as they are."""
        if settings.quantization == "none":
            return None
        return cls(settings.quantization, settings.double_quant, settings.group_size)

    def quantize(self, module: str, weight: Tensor) -> QuantizedWeight:
        """The weight [out, in] of a module in that format.

        Raises:
            ConfigurationError: its inputs make no whole groups.
        """
        try:
            return self._quantize(weight)
        except ValueError as error:
            raise ConfigurationError(
                f"{module} cannot be quantised to {self.name}: {error} "
                "Choose a smaller --group-size or another --quantization."
            ) from error

    def _quantize(self, weight: Tensor) -> QuantizedWeight:
        match self.name:
            case "nf4":
                return quantize_nf4(weight, self.double_quant)
            case "fp4":
                return quantize_fp4(weight, self.double_quant)
            case "int4":
                return quantize_int4(weight, self.group_size)
            case "int8":
                return quantize_int8(weight)

    def described(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A `config.json` that says so."""
        match self.name:
            case "nf4":
                return bnb_format.described(config, NF4, self.double_quant)
            case "fp4":
                return bnb_format.described(config, FP4, self.double_quant)
            case "int4":
                return int4_format.described(config, self.group_size)
            case "int8":
                return int8_format.described(config)
