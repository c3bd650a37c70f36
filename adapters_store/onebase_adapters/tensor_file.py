"""A safetensors file as read-only numpy views of its memory-mapped bytes: nothing is copied, whatever its size.

The safetensors library checks the file; its numpy reader, however, copies every tensor. It knows nothing of adapters.
"""

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .adapter import Array
from .errors import InvalidTensors

DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that an adapter may have, by the name that safetensors gives them."""
BLOB_DTYPES = DTYPES | {"I64": np.dtype(np.int64)}
"""Those of the canonical form, which also has numbers of tokens."""

_HEADER_SIZE = struct.Struct("<Q")  # what a file begins with


@dataclass(frozen=True)
class MappedFile:
    """A file in memory, for as long as a view of it lives."""

    path: Path
    data: mmap.mmap
    """All of its bytes."""
    start: int
    """Where tensors begin in them, behind the header."""

    @property
    def header(self) -> bytes:
        """What tells files apart that differ in more than their tensors' numbers."""
        return self.data[: self.start]


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds."""

    tensors: dict[str, Array]
    """Views of the mapped file, which stays mapped as long as one of them lives."""
    metadata: dict[str, str]


class _HeaderEntry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def map_tensors(path: Path, dtypes: Mapping[str, np.dtype[np.generic]] = DTYPES) -> TensorFile:
    """Map a file in the safetensors format (https://huggingface.co/docs/safetensors/index#format).

    Raises:
        InvalidTensors: it is not safetensors, it is truncated, or a tensor is of none of these dtypes.
    """
    return tensors_of(map_file(path), dtypes)


def map_tensor(path: Path, name: str) -> Array | None:
    """One tensor of a file, None if it has none of that name; raises InvalidTensors as `map_tensors` does."""
    file = map_file(path)
    header = _checked_header(file)
    return _view(file, name, header[name], DTYPES) if name in header else None


def map_file(path: Path) -> MappedFile:
    """Map a file without a look at its tensors, which `tensors_of` takes.

    Raises:
        InvalidTensors: it is too short for its header.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > _HEADER_SIZE.size:
            # To be written to, of which nothing comes to the file: torch warns of memory that cannot be
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            start = _HEADER_SIZE.size + _HEADER_SIZE.unpack_from(data)[0]
            if start <= len(data):
                return MappedFile(path, data, start)
    raise InvalidTensors(f"{path.name} is truncated or is not a safetensors file: it is too short for its header.")


def tensors_of(file: MappedFile, dtypes: Mapping[str, np.dtype[np.generic]] = DTYPES) -> TensorFile:
    """What is in a file; raises InvalidTensors as `map_tensors` does."""
    header = _checked_header(file)
    metadata = header.pop("__metadata__", None) or {}
    return TensorFile({name: _view(file, name, entry, dtypes) for name, entry in header.items()}, metadata)


def _checked_header(file: MappedFile) -> dict[str, Any]:
    try:
        with safe_open(file.path, framework="np"):
            pass  # opening checks the header, and that the tensors fill the file without gap or overlap
    except SafetensorError as error:
        raise InvalidTensors(f"{file.path.name} is truncated or is not a safetensors file: {error}.") from error
    header: dict[str, Any] = json.loads(file.header[_HEADER_SIZE.size :])
    return header


def _view(file: MappedFile, name: str, entry: _HeaderEntry, dtypes: Mapping[str, np.dtype[np.generic]]) -> Array:
    dtype = dtypes.get(entry["dtype"])
    if dtype is None:
        raise InvalidTensors(
            f"Tensor {name} is {entry['dtype']}, but an adapter's tensors have to be float32, float16 or bfloat16."
        )
    begin, end = entry["data_offsets"]
    return np.frombuffer(file.data, dtype, (end - begin) // dtype.itemsize, file.start + begin).reshape(entry["shape"])
