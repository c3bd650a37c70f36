"""A safetensors file as read-only numpy views of its memory-mapped bytes: nothing is copied, whatever its size.

The safetensors library checks the file; its numpy reader, however, copies every tensor. It knows nothing of adapters.
"""

import json
import mmap
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
    data, start, header = _map(path)
    metadata = header.pop("__metadata__", None) or {}
    return TensorFile({name: _view(data, start, name, entry, dtypes) for name, entry in header.items()}, metadata)


def map_tensor(path: Path, name: str) -> Array | None:
    """One tensor of a file, None if it has none of that name; raises InvalidTensors as `map_tensors` does."""
    data, start, header = _map(path)
    return _view(data, start, name, header[name], DTYPES) if name in header else None


def _map(path: Path) -> tuple[mmap.mmap, int, dict[str, Any]]:
    """The file's bytes, where its tensors begin in them, and its header."""
    try:
        with safe_open(path, framework="np"):
            pass  # opening checks the header, and that the tensors fill the file without gap or overlap
    except SafetensorError as error:
        raise InvalidTensors(f"{path.name} is truncated or is not a safetensors file: {error}.") from error
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of memory that cannot be written to
    (header_size,) = struct.unpack_from("<Q", data)
    start = 8 + header_size
    return data, start, json.loads(data[8:start])


def _view(
    data: mmap.mmap, start: int, name: str, entry: _HeaderEntry, dtypes: Mapping[str, np.dtype[np.generic]]
) -> Array:
    dtype = dtypes.get(entry["dtype"])
    if dtype is None:
        raise InvalidTensors(
            f"Tensor {name} is {entry['dtype']}, but an adapter's tensors have to be float32, float16 or bfloat16."
        )
    begin, end = entry["data_offsets"]
    return np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, start + begin).reshape(entry["shape"])
