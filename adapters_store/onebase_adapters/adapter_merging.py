"""Several LoRA adapters merged offline into one, by the methods of PEFT's `add_weighted_adapter`.

A linear that only some of the adapters touch is merged from those. Everything is computed in float32, and the scales of
the sources are folded in, so the result's are 1. What is added to outputs (`lora_bias`) is added up by weight. It knows
nothing of names, versions or files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from .adapter import Adapter, Epilogue, LowRankPair, ModuleKey
from .errors import InvalidMerge

MergeMethod = Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties"]
"""How updates become one, by PEFT's names:

- `cat`: the exact weighted sum, at the sum of the ranks;
- `svd`: the nearest update of a given rank to the exact weighted sum;
- `linear`: weighted sums of all A and of all B, a rough approximation of the sum of their products;
- `ties`: as linear, but only of the largest numbers and of those that agree in sign (arXiv 2306.01708);
- `dare_linear`, `dare_ties`: numbers are dropped at random and the rest rescaled (arXiv 2311.03099).
"""

SignElection = Literal["total", "frequency"]
"""Whether the sign of the sum or of the most adapters counts."""

Matrix = NDArray[np.float32]
OnProgress = Callable[[int, int], None]
"""Called with how many linears are merged and how many there are."""

_KINDS = {"magnitude": "DoRA", "factor": "(IA)³", "bias": "a bias of its own"}
"""What the vectors of an epilogue are that cannot be added up."""

_PRUNING = frozenset({"ties", "dare_linear", "dare_ties"})
_MATRIX_WISE = _PRUNING | {"linear"}


@dataclass(frozen=True)
class MergeRecipe:
    """How to merge; raises InvalidMerge where the options do not belong together."""

    method: MergeMethod = "cat"
    density: float | None = None
    """Share of each matrix's numbers that `ties` and `dare_*` keep, above 0 and up to 1."""
    sign_election: SignElection = "total"
    rank: int | None = None
    """Rank of `svd`'s result; by default the largest of the sources'."""
    seed: int = 0
    """Of what `dare_*` drop: the same seed gives the same adapter."""

    def __post_init__(self) -> None:
        if self.method not in get_args(MergeMethod):
            raise InvalidMerge(f"There is no method {self.method!r}; there are {', '.join(get_args(MergeMethod))}.")
        if (self.density is not None) != (self.method in _PRUNING):
            verb = "needs a" if self.method in _PRUNING else "takes no"
            raise InvalidMerge(f"The method {self.method} {verb} density; {', '.join(sorted(_PRUNING))} prune.")
        if self.density is not None and not 0 < self.density <= 1:
            raise InvalidMerge(f"A density is above 0 and at most 1, not {self.density}.")
        if self.rank is not None and (self.method != "svd" or self.rank < 1):
            raise InvalidMerge("A rank can be chosen for the method svd only, and is at least 1.")


class WeightedAdapter(NamedTuple):
    """An adapter to merge and how much of it."""

    adapter: Adapter
    weight: float
    """Any finite number; a negative one subtracts."""


class _WeightedPair(NamedTuple):
    """One adapter's update of one linear, in float32."""

    lora_a: Matrix
    lora_b: Matrix
    factor: float
    """The adapter's weight times the pair's scale."""


def merge_adapters(
    sources: Sequence[WeightedAdapter], recipe: MergeRecipe, on_progress: OnProgress | None = None
) -> Adapter:
    """Merge adapters of one base; a single one is multiplied by its weight.

    Raises:
        InvalidMerge: there is none, one is no LoRA, a weight is not finite, the ranks of a linear differ where the
            method merges A with A and B with B, or one has a `lora_bias` where it prunes.
    """
    if not sources:
        raise InvalidMerge("A merge takes at least one adapter.")
    for source in sources:
        require_lora(source.adapter)
    if not all(np.isfinite(source.weight) for source in sources):
        raise InvalidMerge("The weights of a merge are finite numbers.")
    shifts = _merge_shifts(sources)
    if shifts and recipe.method in _PRUNING:
        raise InvalidMerge(
            f"The method {recipe.method} prunes matrices, but {next(iter(shifts))} has a lora_bias too. Adapters with "
            "one can be merged by cat, svd and linear."
        )
    rank = recipe.rank or max(source.adapter.rank for source in sources)
    rng = np.random.default_rng(recipe.seed)
    keys = sorted({key for source in sources for key in source.adapter.pairs})
    pairs = {}
    for number, key in enumerate(keys, start=1):
        pairs[key] = _merge_pairs(_pairs_of(key, sources), key, recipe, rank, rng)
        if on_progress:
            on_progress(number, len(keys))
    return Adapter(pairs, shifts)


def require_lora(adapter: Adapter) -> None:
    """Raise InvalidMerge for an adapter that does more than to add low-rank updates, and vectors, to outputs."""
    if adapter.prefix:
        raise InvalidMerge(
            "Virtual tokens (prefix-tuning, prompt tuning and their kin) cannot be merged; only LoRA can."
        )
    if adapter.invocation_tokens:
        raise InvalidMerge("An aLoRA computes behind its invocation tokens alone and cannot be merged; only LoRA can.")
    if adapter.vocabulary:
        raise InvalidMerge(f"What the adapter makes of {adapter.vocabulary} cannot be merged; only LoRA of layers can.")
    if adapter.norms:
        raise InvalidMerge(f"An adapter that replaces {next(iter(adapter.norms))} cannot be merged; only LoRA can.")
    for key, epilogue in adapter.epilogues.items():
        if others := sorted(epilogue.vectors.keys() - {"shift"}):
            raise InvalidMerge(
                f"What follows the update of {key} ({' and '.join(_KINDS[name] for name in others)}) cannot be merged; "
                "only LoRA can."
            )


def _merge_shifts(sources: Sequence[WeightedAdapter]) -> dict[ModuleKey, Epilogue]:
    shifts: dict[ModuleKey, Matrix] = {}
    for adapter, weight in sources:
        for key, epilogue in adapter.epilogues.items():
            if epilogue.shift is not None:
                shifts[key] = shifts.get(key, np.float32(0)) + np.float32(weight) * epilogue.shift.astype(np.float32)
    return {key: Epilogue(shift=shift) for key, shift in shifts.items()}


def _pairs_of(key: ModuleKey, sources: Sequence[WeightedAdapter]) -> list[_WeightedPair]:
    present = [(source.adapter.pairs[key], source.weight) for source in sources if key in source.adapter.pairs]
    return [
        _WeightedPair(pair.lora_a.astype(np.float32), pair.lora_b.astype(np.float32), weight * pair.scale)
        for pair, weight in present
    ]


def _merge_pairs(
    pairs: list[_WeightedPair], key: ModuleKey, recipe: MergeRecipe, rank: int, rng: np.random.Generator
) -> LowRankPair:
    if recipe.method in _MATRIX_WISE:
        return _merge_matrix_wise(pairs, key, recipe, rng)
    lora_a = np.concatenate([pair.lora_a * np.float32(pair.factor) for pair in pairs])
    lora_b = np.concatenate([pair.lora_b for pair in pairs], axis=1)
    if recipe.method == "svd":
        lora_a, lora_b = _truncate(lora_a, lora_b, rank)
    return LowRankPair(lora_a, lora_b, scale=1.0)


def _truncate(lora_a: Matrix, lora_b: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """The best approximation of `lora_b @ lora_a` of that rank (Eckart and Young, 1936).

    The product is never formed: the singular values of a product of two thin matrices are those of the product of their
    two small triangular factors.
    """
    q_b, r_b = np.linalg.qr(lora_b)
    q_a, r_a = np.linalg.qr(lora_a.T)
    u, singular_values, vh = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return vh[:rank] @ q_a.T, q_b @ (u[:, :rank] * singular_values[:rank])


def _merge_matrix_wise(
    pairs: list[_WeightedPair], key: ModuleKey, recipe: MergeRecipe, rng: np.random.Generator
) -> LowRankPair:
    """A with A and B with B, each with the root of the factor; its sign goes to A."""
    ranks = [pair.lora_a.shape[0] for pair in pairs]
    if len(set(ranks)) > 1:
        raise InvalidMerge(
            f"The method {recipe.method} adds A to A and B to B, but at {key} the ranks are {ranks}. "
            "Adapters of different ranks can be merged by cat and by svd."
        )
    factors = np.array([pair.factor for pair in pairs], np.float32)
    roots = np.sqrt(np.abs(factors))
    signed_roots = np.where(factors >= 0, roots, -roots)
    lora_a = _merge_matrices(np.stack([pair.lora_a for pair in pairs]), signed_roots, recipe, rng)
    lora_b = _merge_matrices(np.stack([pair.lora_b for pair in pairs]), roots, recipe, rng)
    return LowRankPair(lora_a, lora_b, scale=1.0)


def _merge_matrices(matrices: Matrix, weights: Matrix, recipe: MergeRecipe, rng: np.random.Generator) -> Matrix:
    """[adapters, rows, columns] and [adapters] to [rows, columns]."""
    if recipe.density is not None and recipe.density < 1:
        matrices = _drop(matrices, recipe.density, rng) if "dare" in recipe.method else _trim(matrices, recipe.density)
    weighted = matrices * weights[:, None, None]
    if "ties" not in recipe.method:
        return _float32(weighted.sum(axis=0))
    # the signs are elected before weighting, as PEFT does: a negative weight changes what is added, not who agrees
    agrees = _agrees_with_majority(matrices, recipe.sign_election)
    return _float32((weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1))


def _trim(matrices: Matrix, density: float) -> Matrix:
    """Each matrix with its largest numbers only (TIES, step 1)."""
    flat = matrices.reshape(len(matrices), -1)
    kept = int(density * flat.shape[1])
    largest = np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :kept]
    trimmed = np.zeros_like(flat)
    np.put_along_axis(trimmed, largest, np.take_along_axis(flat, largest, axis=1), axis=1)
    return trimmed.reshape(matrices.shape)


def _drop(matrices: Matrix, density: float, rng: np.random.Generator) -> Matrix:
    """Each number kept with a probability of `density`, and rescaled so that the expectation stays (DARE)."""
    is_kept = rng.random(matrices.shape, dtype=np.float32) < density
    return _float32(matrices * is_kept / np.float32(density))


def _agrees_with_majority(matrices: Matrix, election: SignElection) -> NDArray[np.bool_]:
    """Which numbers have the sign that was elected for their place (TIES, step 2); a tie is positive."""
    signs = np.sign(matrices)
    votes = (matrices if election == "total" else signs).sum(axis=0)
    return np.equal(signs, np.where(votes >= 0, 1, -1))


def _float32(matrix: NDArray[np.floating]) -> Matrix:
    return matrix.astype(np.float32, copy=False)
