"""The tensors of a model directory, by name, from one safetensors file or from shards. It knows nothing of models.

Tensors are views of the mapped file: what is not touched is not read, and a mapping ends with its last tensor.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open
from torch import Tensor

from onebase_server.errors import ConfigurationError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """Which tensors a directory has, of which shape, and in which file each lies."""

    def __init__(self, directory: Path) -> None:
        """Read the index and the header of every file.

        Raises:
            ConfigurationError: no safetensors are there, or the index or a file of it cannot be read.
        """
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in _files(directory):
            for name, shape in _shapes(path).items():
                shapes[name] = shape
                self._file_of[name] = path
        self.shapes = MappingProxyType(shapes)
        """The shape of every tensor, by name."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted(set(self._file_of.values())))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of those names, on the CPU; raises ConfigurationError where a file lacks what its index says."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in wanted}
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, error) from error
        return tensors


def _files(directory: Path) -> list[Path]:
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file():
        return _files_of_index(index)
    if not single.is_file():
        raise ConfigurationError(
            f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Only safetensors are read; "
            "convert other formats with Transformers' save_pretrained."
        )
    return [single]


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{index} is not a safetensors index: {error!r}.") from error
    if missing := [path.name for path in files if not path.is_file()]:
        raise ConfigurationError(f"{index} names files that are not there: {', '.join(missing)}.")
    return files


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"{path} cannot be read as safetensors ({error}). Was its download cut off?")
