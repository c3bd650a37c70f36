"""The canonical form of an adapter.

This is the only form that the engine and the kernels ever see. It knows nothing of PEFT's file format
(`peft_format`), of disks (`blobs`) or of names and versions (`catalogue`), and it needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import UnsupportedAdapter

Array = NDArray[np.generic]

ALIGNMENT = 16
"""Numbers in a whole vector of the processor."""


class ModuleKey(NamedTuple):
    """One linear of the base: a decoder layer and a projection in it, e.g. `(3, "q_proj")`."""

    layer: int
    projection: str
    expert: int | None = None
    """Whose it is in a mixture of experts; None for what computes for every token."""

    def __str__(self) -> str:
        of_expert = "" if self.expert is None else f"experts.{self.expert}."
        return f"layers.{self.layer}.{of_expert}{self.projection}"


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """One linear's update, `y += scale · lora_b @ (lora_a @ x)` (LoRA, arXiv 2106.09685, section 4.1).

    The scale stays beside the matrices, unfolded, so that storing an adapter loses no bits whatever its dtype.
    """

    lora_a: Array
    """Shape [rank, in_features]; float32, float16 or bfloat16 (ml_dtypes)."""
    lora_b: Array
    """Shape [out_features, rank], of the same dtype."""
    scale: float
    """alpha / rank, or alpha / √rank for rsLoRA."""

    @property
    def rank(self) -> int:
        """The number of rows of `lora_a`."""
        return int(self.lora_a.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices as stored."""
        return int(self.lora_a.nbytes + self.lora_b.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What follows one linear's update, each a vector [out_features] or None.

    With W and b of the base, `y = factor ⊙ (ratio ⊙ (W + ΔW) x + bias + shift)`, where ΔW = scale · lora_b @ lora_a and
    ratio = magnitude / ‖W + ΔW‖, row by row.
    """

    magnitude: Array | None = None
    """DoRA's (arXiv 2402.09353, section 4)."""
    factor: Array | None = None
    """(IA)³'s (arXiv 2205.05638, section 3.3)."""
    bias: Array | None = None
    """What replaces the base's own."""
    shift: Array | None = None
    """What is added to it."""

    @property
    def vectors(self) -> dict[str, Array]:
        """Those that there are, by name."""
        named = (("magnitude", self.magnitude), ("factor", self.factor), ("bias", self.bias), ("shift", self.shift))
        return {name: vector for name, vector in named if vector is not None}

    @property
    def num_outputs(self) -> int:
        """The linear's out_features."""
        return int(next(iter(self.vectors.values())).size)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What every request of an adapter starts behind: one row for each virtual token, which the context counts."""

    rows: Array
    """Shape [tokens, …]; float32, float16 or bfloat16 (ml_dtypes)."""

    @property
    def num_tokens(self) -> int:
        """How many virtual tokens there are."""
        return int(self.rows.shape[0])


@dataclass(frozen=True, slots=True)
class PrefixKV(Prefix):
    """Prefix-tuning (arXiv 2101.00190) and cartridges (arXiv 2506.06266): `rows` [tokens, layers, 2, kv width] are
    keys and values as the cache holds them, the keys already turned to their positions."""


@dataclass(frozen=True, slots=True)
class VirtualTokens(Prefix):
    """Prompt tuning (arXiv 2104.08691) and P-tuning (arXiv 2103.10385): `rows` [tokens, hidden] stand where the
    embeddings of the first tokens would."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The vectors of some tokens, in place of the base's."""

    tokens: NDArray[np.int64]
    """Shape [n], ascending."""
    vectors: Array
    """Shape [n, hidden]; float32, float16 or bfloat16 (ml_dtypes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMatrix:
    """What becomes of a matrix with a vector for each token, the embedding or the head: first its rows are replaced,
    then the pair is added."""

    rows: TokenRows | None = None
    pair: LowRankPair | None = None
    """From tokens to hidden states in the embedding, from hidden states to tokens in the head."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What becomes of the base's tokens."""

    embedding: TokenMatrix = field(default_factory=TokenMatrix)
    head: TokenMatrix = field(default_factory=TokenMatrix)
    """Where it is tied to the embedding, its rows are the embedding's, the same object, and lie in memory once."""
    size: int | None = None
    """How many tokens there are, if not as many as the base has; the embedding has a row for each that is added. Tokens
    that are added and have no row in the head are never sampled."""

    def __str__(self) -> str:
        return " and ".join(self.matrices) or "the vocabulary"

    @property
    def matrices(self) -> dict[str, TokenMatrix]:
        """Those that change, by their modules' names."""
        named = (("embed_tokens", self.embedding), ("lm_head", self.head))
        return {name: matrix for name, matrix in named if matrix.rows or matrix.pair}

    @property
    def has_tied_rows(self) -> bool:
        """Whether embedding and head have the same rows."""
        return self.head.rows is not None and self.head.rows is self.embedding.rows

    @property
    def arrays(self) -> list[Array]:
        """All numbers, each once."""
        rows = [self.embedding.rows, None if self.has_tied_rows else self.head.rows]
        pairs = [self.embedding.pair, self.head.pair]
        matrices = [matrix for pair in pairs if pair for matrix in (pair.lora_a, pair.lora_b)]
        return [*(part.vectors for part in rows if part), *matrices]


@dataclass(frozen=True, slots=True)
class NormVectors:
    """What replaces a norm's own as a checkpoint has them, each [size]; None leaves it alone."""

    weight: Array | None = None
    bias: Array | None = None

    @property
    def vectors(self) -> dict[str, Array]:
        """Those that there are, by name."""
        named = (("weight", self.weight), ("bias", self.bias))
        return {name: vector for name, vector in named if vector is not None}


@dataclass(frozen=True)
class Adapter:
    """A customer's difference from the base: for each linear that it touches a low-rank pair, an epilogue or both, and
    what becomes of the vocabulary and of norms; or a prefix."""

    pairs: Mapping[ModuleKey, LowRankPair] = field(repr=False)
    epilogues: Mapping[ModuleKey, Epilogue] = field(default_factory=dict, repr=False)
    prefix: Prefix | None = field(default=None, repr=False)
    vocabulary: Vocabulary | None = field(default=None, repr=False)
    norms: Mapping[str, NormVectors] = field(default_factory=dict, repr=False)
    """By module: `norm`, the last one, `layers.3.input_layernorm`, `layers.3.self_attn.q_norm`."""
    invocation_tokens: tuple[int, ...] = ()
    """Of aLoRA (arXiv 2504.12397): from their last occurrence in a prompt on the adapter computes, before them the base
    alone, as it does for a prompt without them. Empty where the adapter computes everything."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", MappingProxyType(dict(sorted(self.pairs.items()))))
        object.__setattr__(self, "epilogues", MappingProxyType(dict(sorted(self.epilogues.items()))))
        object.__setattr__(self, "norms", MappingProxyType(dict(sorted(self.norms.items()))))

    def require_exportable(self) -> None:
        """Raise UnsupportedAdapter for what no export writes."""
        if self.vocabulary:
            raise UnsupportedAdapter(f"The adapter changes {self.vocabulary}, so it can be served, but not exported.")
        if self.norms:
            module = next(iter(self.norms))
            raise UnsupportedAdapter(f"The adapter replaces {module}, so it can be served, but not exported.")

    def require_mergeable(self) -> None:
        """Raise UnsupportedAdapter unless the adapter changes the base's linears and norms alone, for every token."""
        if self.vocabulary:
            raise UnsupportedAdapter(
                f"The adapter changes {self.vocabulary}, so it can be served, but not merged into the base's weights."
            )
        if self.prefix is not None:
            raise UnsupportedAdapter("The adapter is virtual tokens, which cannot be merged into the base's weights.")
        if self.invocation_tokens:
            raise UnsupportedAdapter(
                "The adapter is an aLoRA, which computes behind its invocation tokens alone, so it cannot be merged "
                "into the base's weights."
            )

    @cached_property
    def rank(self) -> int:
        """The largest rank of any pair; 0 without pairs."""
        matrices = self.vocabulary.matrices.values() if self.vocabulary else ()
        outer = [matrix.pair.rank for matrix in matrices if matrix.pair]
        return max((*outer, *(pair.rank for pair in self.pairs.values())), default=0)

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the adapter has; None for as many as the base."""
        return self.vocabulary.size if self.vocabulary else None

    @property
    def num_virtual_tokens(self) -> int:
        """How many positions of the context the prefix takes."""
        return self.prefix.num_tokens if self.prefix else 0

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The projections and norms touched in at least one layer, and what is outside of them; sorted."""
        outer = self.vocabulary.matrices if self.vocabulary else ()
        norms = (name.rpartition(".")[2] for name in self.norms)
        return tuple(sorted({*(key.projection for key in (*self.pairs, *self.epilogues)), *outer, *norms}))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all numbers as stored."""
        prefix = self.prefix.rows.nbytes if self.prefix else 0
        vectors = [vector for epilogue in self.epilogues.values() for vector in epilogue.vectors.values()]
        pairs = sum(pair.nbytes for pair in self.pairs.values())
        return prefix + pairs + sum(array.nbytes for array in (*vectors, *self._beside_linears))

    @cached_property
    def num_parameters(self) -> int:
        """How many numbers it is on the device; times the compute dtype's size, this is what it costs there.

        An epilogue becomes two vectors, whatever it has. What is not of linears is filled up to whole vectors of the
        processor, for what lies behind it to begin at one.
        """
        prefix = self.prefix.rows.size if self.prefix else 0
        epilogues = sum(2 * epilogue.num_outputs for epilogue in self.epilogues.values())
        pairs = sum(pair.lora_a.size + pair.lora_b.size for pair in self.pairs.values())
        others = sum(array.size for array in self._beside_linears)
        return prefix + epilogues + pairs + -(-others // ALIGNMENT) * ALIGNMENT

    @property
    def _beside_linears(self) -> list[Array]:
        """The numbers of vocabulary and norms."""
        vocabulary = self.vocabulary.arrays if self.vocabulary else []
        return [*vocabulary, *(vector for norm in self.norms.values() for vector in norm.vectors.values())]


ROUTER = "gate"
"""The projection that scores a mixture's experts, as checkpoints and PEFT call it."""
