"""The canonical form on disk: one safetensors file per adapter, named by its own sha256, never changed once written.

Tensors are `layers.{i}.{projection}.lora_a` and `.lora_b` (`layers.{i}.experts.{j}.{projection}…` of an expert), and
`.magnitude`, `.factor`, `.bias` and `.shift` of epilogues, `embed_tokens.{part}` and `lm_head.{part}` of the
vocabulary, or `prefix_kv` or `virtual_tokens` alone, in the dtype they came in; one metadata entry holds the rest as
JSON with sorted keys, so that the same adapter always gives the same bytes. It knows nothing of names and versions.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import regex
from safetensors.numpy import save_file

from .adapter import (
    Adapter,
    Array,
    Epilogue,
    LowRankPair,
    ModuleKey,
    NormVectors,
    Prefix,
    PrefixKV,
    TokenMatrix,
    TokenRows,
    VirtualTokens,
    Vocabulary,
)
from .errors import InvalidTensors, StoreError
from .tensor_file import BLOB_DTYPES, MappedFile, TensorFile, map_file, tensors_of

FORMAT_VERSION = 1
METADATA_KEY = "onebase"

TENSOR_NAME = regex.compile(
    r"layers\.(?P<layer>[0-9]+)\.(?:experts\.(?P<expert>[0-9]+)\.)?(?P<projection>\w+)\."
    r"(?P<part>lora_a|lora_b|magnitude|factor|bias|shift)"
)

_MATRICES = ("embed_tokens", "lm_head")

_NORMS = "norms"

_PREFIX_NAMES: dict[type[Prefix], str] = {PrefixKV: "prefix_kv", VirtualTokens: "virtual_tokens"}


def write_blob(adapter: Adapter, path: Path) -> str:
    """Write the canonical form to `path`, through to the disk, and return its sha256 in hexadecimal."""
    tensors = {}
    for key, pair in adapter.pairs.items():
        tensors[f"{key}.lora_a"] = np.ascontiguousarray(pair.lora_a)
        tensors[f"{key}.lora_b"] = np.ascontiguousarray(pair.lora_b)
    for key, epilogue in adapter.epilogues.items():
        tensors |= {f"{key}.{name}": np.ascontiguousarray(vector) for name, vector in epilogue.vectors.items()}
    if adapter.prefix is not None:
        tensors[_PREFIX_NAMES[type(adapter.prefix)]] = np.ascontiguousarray(adapter.prefix.rows)
    for module, norm in adapter.norms.items():
        tensors |= {f"norms.{module}.{name}": np.ascontiguousarray(vector) for name, vector in norm.vectors.items()}
    scales = {str(key): pair.scale for key, pair in adapter.pairs.items()}
    description: dict[str, object] = {"format_version": FORMAT_VERSION, "scales": scales}
    if adapter.vocabulary is not None:
        tensors |= _vocabulary_tensors(adapter.vocabulary)
        description["vocabulary"] = _describe_vocabulary(adapter.vocabulary)
    if adapter.invocation_tokens:
        description["invocation_tokens"] = adapter.invocation_tokens
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(description, sort_keys=True)})
    sync(path)
    return file_digest(path)


def read_blob(path: Path) -> Adapter:
    """Read a blob without copying: its arrays are read-only views of the mapped file.

    The structure is checked here, the digest is not: `AdapterStore.verify` does that.

    Raises:
        StoreError: there is no such file, or it is not a blob of this format.
    """
    return parse_blob(map_blob(path))


def map_blob(path: Path) -> MappedFile:
    """Map a blob without a look at what is in it; raises StoreError where there is none."""
    with _store_errors(path):
        return map_file(path)


def parse_blob(file: MappedFile) -> Adapter:
    """What is in a mapped blob; as `read_blob`."""
    with _store_errors(file.path):
        return _parse(tensors_of(file, BLOB_DTYPES))


@contextmanager
def _store_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"The adapter store has no blob {path.name}.") from error
    except (InvalidTensors, LookupError, TypeError, ValueError) as error:
        raise StoreError(
            f"Blob {path.name} is damaged: {error} Run `onebase adapters verify --repair`, then publish again."
        ) from error


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(file: TensorFile) -> Adapter:
    description = json.loads(file.metadata[METADATA_KEY])
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format version is {description['format_version']}, not {FORMAT_VERSION}.")
    for kind, name in _PREFIX_NAMES.items():
        if set(file.tensors) == {name}:
            return Adapter({}, prefix=kind(file.tensors[name]))
    scales = dict(description["scales"])
    vocabulary = _vocabulary(description["vocabulary"], file) if "vocabulary" in description else None
    norms = _norms(file)
    pairs: dict[ModuleKey, LowRankPair] = {}
    epilogues: dict[ModuleKey, Epilogue] = {}
    for key, parts in _parts_by_linear(file).items():
        if str(key) in scales:
            pairs[key] = _pair(key, parts.pop("lora_a"), parts.pop("lora_b"), float(scales.pop(str(key))))
        if parts:
            epilogues[key] = Epilogue(**parts)  # which takes no matrix that has no scale
    if scales or not (pairs or epilogues or vocabulary or norms):
        raise ValueError("its tensors are not those that its metadata announces.")
    invocation_tokens = tuple(map(int, description.get("invocation_tokens", ())))
    return Adapter(pairs, epilogues, vocabulary=vocabulary, norms=norms, invocation_tokens=invocation_tokens)


def _parts_by_linear(file: TensorFile) -> dict[ModuleKey, dict[str, Array]]:
    parts: dict[ModuleKey, dict[str, Array]] = {}
    for name, tensor in file.tensors.items():
        if (place := _linear_and_part(name)) is not None:
            key, part = place
            parts.setdefault(key, {})[part] = tensor
    return parts


@lru_cache(maxsize=1 << 16)  # adapters of a base have the same names, and reading these is most of reading a blob
def _linear_and_part(name: str) -> tuple[ModuleKey, str] | None:
    """Of a linear's tensor; None of the vocabulary's and the norms'."""
    if name.partition(".")[0] in (*_MATRICES, _NORMS):
        return None
    match = TENSOR_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not the name of a linear's tensor.")
    key = ModuleKey(int(match["layer"]), match["projection"], int(match["expert"]) if match["expert"] else None)
    return key, match["part"]


def _norms(file: TensorFile) -> dict[str, NormVectors]:
    parts: dict[str, dict[str, Array]] = {}
    for name, tensor in file.tensors.items():
        kind, _, rest = name.partition(".")
        if kind == _NORMS:
            module, _, part = rest.rpartition(".")
            parts.setdefault(module, {})[part] = tensor
    return {module: NormVectors(**vectors) for module, vectors in parts.items()}


def _vocabulary_tensors(vocabulary: Vocabulary) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for name, matrix in vocabulary.matrices.items():
        if matrix.rows and not (name == "lm_head" and vocabulary.has_tied_rows):
            tensors |= {f"{name}.tokens": matrix.rows.tokens, f"{name}.vectors": matrix.rows.vectors}
        if matrix.pair:
            tensors |= {f"{name}.lora_a": matrix.pair.lora_a, f"{name}.lora_b": matrix.pair.lora_b}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _describe_vocabulary(vocabulary: Vocabulary) -> dict[str, object]:
    scales = {name: matrix.pair.scale for name, matrix in vocabulary.matrices.items() if matrix.pair}
    return {"scales": scales, "size": vocabulary.size, "tied_rows": vocabulary.has_tied_rows}


def _vocabulary(description: dict[str, Any], file: TensorFile) -> Vocabulary:
    embedding, head = (_matrix(name, file, description["scales"]) for name in _MATRICES)
    if description["tied_rows"]:
        head = TokenMatrix(rows=embedding.rows, pair=head.pair)
    return Vocabulary(embedding=embedding, head=head, size=description["size"])


def _matrix(name: str, file: TensorFile, scales: dict[str, float]) -> TokenMatrix:
    part = {part: file.tensors.get(f"{name}.{part}") for part in ("tokens", "vectors", "lora_a", "lora_b")}
    rows = pair = None
    if part["tokens"] is not None and part["vectors"] is not None:
        rows = TokenRows(part["tokens"].astype(np.int64, copy=False), part["vectors"])
    if part["lora_a"] is not None and part["lora_b"] is not None:
        pair = _pair(name, part["lora_a"], part["lora_b"], float(scales[name]))
    return TokenMatrix(rows=rows, pair=pair)


def _pair(key: ModuleKey | str, lora_a: Array, lora_b: Array, scale: float) -> LowRankPair:
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1] or lora_a.dtype != lora_b.dtype:
        raise ValueError(f"the matrices of {key} do not belong together.")
    return LowRankPair(lora_a, lora_b, scale)
