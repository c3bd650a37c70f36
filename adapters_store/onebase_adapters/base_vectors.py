"""The base's own embedding and head, mapped from its checkpoint, to tell which vectors of an upload are others.

It reads no other tensor, and of these two nothing before they are asked for.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .adapter import Array
from .errors import InvalidTensors
from .tensor_file import map_tensor

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_NAMES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}

_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class BaseVectors:
    """Embedding and head of a base in a Hugging Face directory."""

    directory: Path
    is_tied: bool
    """Whether the head is the embedding."""

    def differing(self, matrix: str, vectors: Array) -> NDArray[np.int64]:
        """The tokens whose vectors [tokens, hidden] are not the base's, of `embed_tokens` or `lm_head`; ascending.

        Those are equal that are so once the base's are rounded to the dtype of the others. Where the checkpoint does
        not have the matrix as a plain tensor, all differ.
        """
        base = self._read("embed_tokens" if self.is_tied else matrix)
        if base is None or base.shape[1:] != vectors.shape[1:]:
            return np.arange(len(vectors))
        shared = min(len(base), len(vectors))
        differs = np.ones(len(vectors), bool)
        for start in range(0, shared, _ROWS_AT_A_TIME):
            rows = slice(start, min(start + _ROWS_AT_A_TIME, shared))
            differs[rows] = (base[rows].astype(vectors.dtype, copy=False) != vectors[rows]).any(axis=1)
        return np.flatnonzero(differs)

    def _read(self, matrix: str) -> Array | None:
        name = _NAMES[matrix]
        try:
            index = json.loads((self.directory / _INDEX_FILE).read_text(encoding="utf-8"))
            file = str(index["weight_map"].get(name, _SINGLE_FILE))
        except FileNotFoundError:
            file = _SINGLE_FILE
        try:
            return map_tensor(self.directory / file, name)
        except (FileNotFoundError, InvalidTensors):
            return None
