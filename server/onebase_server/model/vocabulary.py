"""Embeddings and logits of adapters that change the base's vocabulary: vectors of tokens, low-rank pairs, added tokens.

It computes beside the step's program: the embeddings go into it as rows (`onebase_kernels.replace_rows_`), the logits
are computed behind it. It knows neither memory nor files: tensors are handed to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import onebase_kernels as kernels
from onebase_kernels import ReplacedRows


@dataclass(frozen=True)
class TokenRows:
    """Vectors of some tokens, in place of the base's."""

    tokens: Tensor
    """int64 [n], ascending; on the host for the embedding, on the device for the head."""
    vectors: Tensor
    """[n, hidden]."""

    def find(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """For each token whether it is among them (bool), and its row if so; all on the host."""
        rows = torch.searchsorted(self.tokens, token_ids).clamp_max(self.tokens.shape[0] - 1)
        return self.tokens[rows] == token_ids, rows


class Pair(NamedTuple):
    """A low-rank update, as `onebase_kernels.dense_linear` and `head_logits` take its matrices."""

    down: Tensor
    """Of the embedding [vocab, rank], a row for each token; of the head [rank, hidden]."""
    up: Tensor
    """Of the embedding [hidden, rank], of the head [vocab, rank]; the scale folded in."""


@dataclass(frozen=True)
class AdapterVocabulary:
    """What an adapter in device memory makes of embedding and head; None where it leaves them alone."""

    embedding_rows: TokenRows | None
    embedding_pair: Pair | None
    head_rows: TokenRows | None
    head_pair: Pair | None
    num_tokens: int
    """How many the adapter has; the embedding has a row for each that the base has not."""
    num_sampled: int
    """How many of them, the first ones, have logits."""

    def embed(self, token_ids: Tensor, table: Tensor, scale: float) -> ReplacedRows | None:
        """Embeddings of those of `token_ids` [T], on the host, that are not the base's `scale · table[token]`."""
        device = table.device
        is_own, own_rows = _find(self.embedding_rows, token_ids)
        if self.embedding_pair is None:
            if self.embedding_rows is None or not is_own.any():
                return None
            vectors = kernels.embed(own_rows[is_own].to(device), self.embedding_rows.vectors, scale)
            return ReplacedRows(is_own.nonzero().flatten(), vectors)
        vectors = kernels.embed(token_ids.masked_fill(is_own, 0).to(device), table, scale)
        if self.embedding_rows is not None and is_own.any():
            vectors[is_own.to(device)] = kernels.embed(own_rows[is_own].to(device), self.embedding_rows.vectors, scale)
        shrunk = kernels.embed(token_ids.to(device), self.embedding_pair.down, scale)
        vectors += kernels.dense_linear(shrunk, self.embedding_pair.up)
        return ReplacedRows(torch.arange(token_ids.shape[0]), vectors)

    def adapt_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Logits [R, ≥ num_tokens] of rows of this adapter, from the base's and the rows' hidden states [R, hidden]."""
        if self.head_rows is not None:
            own = kernels.head_logits(hidden, self.head_rows.vectors)
            logits = logits.index_copy(1, self.head_rows.tokens, own)
        if self.head_pair is not None:
            delta = kernels.head_logits(kernels.dense_linear(hidden, self.head_pair.down), self.head_pair.up)
            logits[:, : delta.shape[1]] += delta
        return logits


class AdaptedRows(NamedTuple):
    """Rows of hidden states whose logits are those of an adapter's vocabulary."""

    rows: list[int]
    vocabulary: AdapterVocabulary


def adapt_logits(logits: Tensor, hidden: Tensor, adapted: Sequence[AdaptedRows]) -> Tensor:
    """The base's logits [R, vocab] of hidden states [R, hidden], those of `adapted` replaced, as wide as the widest.

    What is beyond a row's own vocabulary holds no logits (`mask_missing_`).
    """
    missing = max(vocabulary.num_tokens for _, vocabulary in adapted) - logits.shape[1]
    logits = F.pad(logits, (0, max(0, missing)))
    for rows, vocabulary in adapted:
        logits[rows] = vocabulary.adapt_logits(logits[rows], hidden[rows])
    return logits


def mask_missing_(logits: Tensor, vocab_size: int, adapted: Sequence[AdaptedRows]) -> None:
    """Give -inf to tokens that are not in the row's vocabulary, which has `vocab_size` tokens in all rows but these."""
    sizes = torch.full((logits.shape[0], 1), vocab_size)
    for rows, vocabulary in adapted:
        sizes[rows] = vocabulary.num_sampled
    tokens = torch.arange(logits.shape[1], device=logits.device)
    logits.masked_fill_(tokens >= sizes.to(logits.device), -torch.inf)


def _find(rows: TokenRows | None, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    nothing = torch.zeros_like(token_ids)
    return (nothing.bool(), nothing) if rows is None else rows.find(token_ids)
