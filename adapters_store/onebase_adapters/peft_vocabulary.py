"""What PEFT saves of a base's embedding and head: LoRA on them, whole ones, and vectors of single tokens.

Whole ones are there for two reasons: `modules_to_save` trains a copy, or `save_embedding_layers` writes down the base's
own, because the vocabulary was resized or because LoRA is on it. Where the base ties its head to the embedding, its own
are one; a trained copy is by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from .adapter import Array, LowRankPair, TokenMatrix, TokenRows, Vocabulary
from .base_layout import BaseLayout
from .base_vectors import BaseVectors
from .errors import InvalidConfig, InvalidTensors, UnsupportedAdapter
from .peft_config import CONFIG_FILE, flag
from .peft_tensors import ADAPTER_NAME, PEFT_LEVELS, NamedTensors

EMBEDDING, HEAD = "embed_tokens", "lm_head"
MODULES = {EMBEDDING: "model.embed_tokens", HEAD: "lm_head"}
"""The matrices, and their names in the base model."""

MAX_ADDED_TOKENS = 1 << 16
"""Tokens that an adapter may add to the base's: each makes all logits of its rows longer."""

VOCABULARY_OPTIONS = frozenset({"ensure_weight_tying", "modules_to_save", "trainable_token_indices"})

_TENSOR = regex.compile(
    rf"{PEFT_LEVELS}(?:model\.)?(?:language_model\.)?(?:model\.)?(?P<matrix>embed_tokens|lm_head)\.(?:"
    rf"(?P<lora_A>lora_embedding_A{ADAPTER_NAME}|lora_A{ADAPTER_NAME}\.weight)"
    rf"|(?P<lora_B>lora_embedding_B{ADAPTER_NAME}|lora_B{ADAPTER_NAME}\.weight)"
    r"|(?P<weight>weight)"
    r"|(?P<base>(?:base_layer|original_module|token_adapter\.base_layer)\.weight)"
    rf"|(?P<copy>modules_to_save{ADAPTER_NAME}\.weight)"  # of what is in `weight`
    rf"|(?P<rows>token_adapter\.trainable_tokens_delta{ADAPTER_NAME}))"
)
_KINDS = ("lora_A", "lora_B", "weight", "base", "copy", "rows")


@dataclass(frozen=True)
class VocabularyOptions:
    """What VOCABULARY_OPTIONS say."""

    modules_to_save: tuple[str, ...]
    trainable_tokens: Mapping[str, NDArray[np.int64]]
    """The tokens of each matrix that `trainable_token_indices` names, in the order of their vectors."""
    ties: bool
    """Whether a head that the base ties has LoRA of its own that is the embedding's: `ensure_weight_tying`."""

    @classmethod
    def read(cls, config: dict[str, Any]) -> "VocabularyOptions":
        """Check the fields; raises InvalidConfig or UnsupportedAdapter."""
        names = config.get("modules_to_save") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InvalidConfig(f"{CONFIG_FILE}: modules_to_save should be a list of names, not {names!r}.")
        tokens = config.get("trainable_token_indices") or {}
        if isinstance(tokens, list):
            tokens = {EMBEDDING: tokens}
        if not isinstance(tokens, dict):
            raise InvalidConfig(
                f"{CONFIG_FILE}: trainable_token_indices should be token ids, or map modules to them, not {tokens!r}."
            )
        return cls(
            modules_to_save=tuple(names),
            trainable_tokens=dict(_trainable(name, indices) for name, indices in tokens.items()),
            ties=flag(config, "ensure_weight_tying"),
        )

    @property
    def is_any(self) -> bool:
        """Whether they say anything."""
        return bool(self.modules_to_save or self.trainable_tokens)

    def require_carried(self, norms: Sequence[str]) -> None:
        """Raise UnsupportedAdapter where `modules_to_save` names more than embedding, head and these norms."""
        for name in self.modules_to_save:
            if _matrix_of(name) is None and not any(norm.endswith(name) for norm in norms):
                raise UnsupportedAdapter(
                    f"{CONFIG_FILE}: modules_to_save names {name}; this server replaces {EMBEDDING}, {HEAD} and norms "
                    "alone."
                )

    def trains(self, matrix: str) -> bool:
        """Whether `modules_to_save` names a matrix, as PEFT matches it."""
        return any(MODULES[matrix].endswith(name) for name in self.modules_to_save)


@dataclass
class MatrixTensors(NamedTensors):
    """Those of the embedding or the head."""

    matrix: str

    @property
    def has_pair(self) -> bool:
        """Whether there is LoRA on it."""
        return "lora_A" in self.tensors or "lora_B" in self.tensors

    @property
    def num_tokens(self) -> int | None:
        """How many tokens the tensors are for; None where they do not tell."""
        of_pair = ("lora_A", 1) if self.matrix == EMBEDDING else ("lora_B", 0)
        for kind, axis in (("weight", 0), ("base", 0), of_pair):
            if kind in self.tensors and self.tensors[kind][1].ndim == 2:
                return int(self.tensors[kind][1].shape[axis])
        return None

    def features(self, size: int, layout: BaseLayout) -> tuple[int, int]:
        """Inputs and outputs of a vocabulary of that size."""
        return (size, layout.hidden_size) if self.matrix == EMBEDDING else (layout.hidden_size, size)


Found = Mapping[str, MatrixTensors]
"""The tensors of each matrix."""


def split_vocabulary(tensors: Mapping[str, Array]) -> tuple[Found, dict[str, Array]]:
    """The tensors of embedding and head, and all others; raises InvalidTensors where one is there twice."""
    found = {matrix: MatrixTensors(module, matrix) for matrix, module in MODULES.items()}
    others = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            others[name] = tensor
        else:
            found[match["matrix"]].add(next(kind for kind in _KINDS if match[kind] is not None), name, tensor)
    return found, others


def vocabulary_size(found: Found, options: VocabularyOptions, layout: BaseLayout) -> int:
    """How many tokens the adapter has; raises InvalidTensors where that is none or too many more than the base has."""
    if layout.vocab_size is None:
        raise InvalidTensors(
            "The adapter changes embedding or head, and this store does not know how large they are; open it once with "
            "its base, by onebase serve or --base."
        )
    told = next((part.num_tokens for part in found.values() if part.num_tokens is not None), None)
    named = max((int(tokens.max()) + 1 for tokens in options.trainable_tokens.values()), default=0)
    size = max(layout.vocab_size, named) if told is None else told
    if not 0 < size <= layout.vocab_size + MAX_ADDED_TOKENS:
        raise InvalidTensors(
            f"The adapter has {size} tokens; this server carries 1 to {layout.vocab_size + MAX_ADDED_TOKENS}, "
            f"{MAX_ADDED_TOKENS} more than the base."
        )
    if named > size:
        raise InvalidTensors(
            f"{CONFIG_FILE}: trainable_token_indices names token {named - 1}, but the adapter has {size} tokens."
        )
    return size


def read_vocabulary(
    found: Found,
    pairs: Mapping[str, LowRankPair],
    size: int,
    options: VocabularyOptions,
    layout: BaseLayout,
    base: BaseVectors | None,
) -> Vocabulary | None:
    """What the tensors of embedding and head make of the base's vocabulary; None if nothing.

    `pairs` has what LoRA's tensors are, `size` is `vocabulary_size`. Of whole matrices the rows are kept that are not
    the base's, if it is at hand.

    Raises:
        InvalidTensors: a tensor, which the text names, is missing, too much or does not fit; or an added token has no
            vector.
    """
    reader = _RowReader(found, options, layout, base, size)
    reader.refuse_unnamed()
    embedding, head = reader.rows(EMBEDDING), reader.rows(HEAD)
    if embedding and head and _are_same(embedding, head):
        head = embedding
    vocabulary = Vocabulary(
        TokenMatrix(rows=embedding, pair=pairs.get(EMBEDDING)),
        TokenMatrix(rows=head, pair=pairs.get(HEAD)),
        size=None if size == layout.vocab_size else size,
    )
    _require_added(vocabulary, layout)
    return vocabulary if vocabulary.matrices or vocabulary.size else None


@dataclass(frozen=True)
class _RowReader:
    """Replaced rows: first those of the base's matrix as it was saved, or of the trained copy, then single tokens."""

    found: Found
    options: VocabularyOptions
    layout: BaseLayout
    base: BaseVectors | None
    size: int

    def refuse_unnamed(self) -> None:
        """Raise InvalidTensors for tensors that the configuration does not name, so that PEFT would not load them."""
        for matrix, module in self.found.items():
            is_named = matrix in self.options.trainable_tokens or (matrix == HEAD and self._head_follows)
            if "rows" in module.tensors and not is_named:
                name, _ = module.tensors["rows"]
                raise InvalidTensors(f"There is {name}, but trainable_token_indices does not name {matrix}.")
            if "copy" in module.tensors and not self.options.trains(matrix):
                name, _ = module.tensors["copy"]
                raise InvalidTensors(f"There is {name}, but modules_to_save does not name {matrix}.")

    def rows(self, matrix: str) -> TokenRows | None:
        """Those of a matrix that are not the base's; None if all are."""
        whole, single = self._whole(matrix), self._single(matrix)
        changed = self._differing(matrix, whole) if whole is not None else np.empty(0, np.int64)
        if single is None:
            return TokenRows(changed, whole[changed]) if whole is not None and changed.size else None
        if whole is None:
            return single
        rest = np.setdiff1d(changed, single.tokens)
        tokens = np.concatenate([rest, single.tokens])
        order = np.argsort(tokens)
        vectors = np.concatenate([whole[rest], single.vectors.astype(whole.dtype)])
        return TokenRows(tokens[order], vectors[order])

    def _differing(self, matrix: str, whole: Array) -> NDArray[np.int64]:
        return self.base.differing(matrix, whole) if self.base else np.arange(len(whole))

    def _whole(self, matrix: str) -> Array | None:
        """All rows, as a trained copy has them or else the base's matrix as it was saved."""
        if self.options.trains(matrix):
            if "weight" not in self.found[matrix].tensors:
                raise InvalidTensors(f"modules_to_save names {matrix}, but there is no {MODULES[matrix]}.weight.")
            return self._take(matrix, "weight")
        other = HEAD if matrix == EMBEDDING else EMBEDDING
        for candidate in (matrix, other) if self.layout.is_tied else (matrix,):
            kinds = ("base",) if self.options.trains(candidate) else ("base", "weight")
            for kind in kinds:
                if kind in self.found[candidate].tensors:
                    return self._take(candidate, kind)
        return None

    def _single(self, matrix: str) -> TokenRows | None:
        """Vectors of single tokens."""
        named = self.options.trainable_tokens
        if matrix == HEAD and self._head_follows:
            matrix = EMBEDDING
        if matrix not in named:
            return None
        if "rows" not in self.found[matrix].tensors:
            raise InvalidTensors(
                f"trainable_token_indices names {matrix}, but there is no trainable_tokens_delta for {MODULES[matrix]}."
            )
        vectors = self._take(matrix, "rows", len(named[matrix]))
        order = np.argsort(named[matrix])
        return TokenRows(named[matrix][order], vectors[order])

    @property
    def _head_follows(self) -> bool:
        """Whether the head has the embedding's single tokens: it is tied, and names no others."""
        named = self.options.trainable_tokens
        return (
            bool(self.layout.is_tied)
            and EMBEDDING in named
            and np.array_equal(named.get(HEAD, named[EMBEDDING]), named[EMBEDDING])
        )

    def _take(self, matrix: str, kind: str, rows: int | None = None) -> Array:
        return self.found[matrix].take(kind, self.size if rows is None else rows, self.layout.hidden_size)


def _require_added(vocabulary: Vocabulary, layout: BaseLayout) -> None:
    """Every token that is added has a vector in the embedding; in the head all have one or none has."""
    first, last = layout.vocab_size or 0, vocabulary.size or 0
    added = max(0, last - first)
    for name, matrix in ((EMBEDDING, vocabulary.embedding), (HEAD, vocabulary.head)):
        given = 0 if matrix.rows is None else int((matrix.rows.tokens >= first).sum())
        if given < added and (name == EMBEDDING or given):
            raise InvalidTensors(
                f"The adapter has {last} tokens, {added} more than the base, but {given} of them have a vector in "
                f"{name}; save it with save_embedding_layers=True."
            )


def _are_same(first: TokenRows, second: TokenRows) -> bool:
    return np.array_equal(first.tokens, second.tokens) and np.array_equal(first.vectors, second.vectors)


def _matrix_of(name: str) -> str | None:
    """The matrix that a module's name, or the end of it, means."""
    return next((matrix for matrix, module in MODULES.items() if name and module.endswith(name)), None)


def _trainable(name: str, indices: object) -> tuple[str, NDArray[np.int64]]:
    matrix = _matrix_of(name)
    if matrix is None:
        raise UnsupportedAdapter(
            f"{CONFIG_FILE}: trainable_token_indices names {name}; this server carries {EMBEDDING} and {HEAD} alone."
        )
    if not _are_token_ids(indices):
        raise InvalidConfig(
            f"{CONFIG_FILE}: trainable_token_indices of {name} should be different token ids, not {indices!r}."
        )
    return matrix, np.array(indices, np.int64)


def _are_token_ids(indices: object) -> bool:
    if not isinstance(indices, list) or not indices:
        return False
    is_each = all(type(index) is int and 0 <= index < 1 << 31 for index in indices)
    return is_each and len(set(indices)) == len(indices)
