"""Opening a GGUF file and reading its key-value metadata with clear errors; what the keys mean is not known here.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from onebase_server.errors import ConfigurationError


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Map `path` into memory and parse its header.

    Raises:
        ConfigurationError: The file is missing, is not GGUF, or is cut short.
    """
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, IndexError, KeyError) as error:
        raise ConfigurationError(f"{path} is not a whole GGUF file: {error}.") from error


class GgufMetadata:
    """The key-value section of a GGUF file as plain Python values."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = values
        self.architecture: str = self.require("general.architecture")

    @classmethod
    def from_reader(cls, path: Path, reader: gguf.GGUFReader) -> "GgufMetadata":
        """Decode every field of an open file."""
        return cls(path, {name: _plain(field) for name, field in reader.fields.items()})

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where the file does not say."""
        return self._values.get(key, default)

    def require(self, key: str) -> Any:
        """The value of `key`; a ConfigurationError that names it where the file does not say."""
        if key not in self._values:
            raise ConfigurationError(f"{self.path} has no metadata key {key!r}, which the import needs.")
        return self._values[key]


def _plain(field: gguf.ReaderField) -> Any:
    value = field.contents()
    if field.types == [gguf.GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))  # the decimal that was meant: 1e-05, not 9.999999747378752e-06
    return value
