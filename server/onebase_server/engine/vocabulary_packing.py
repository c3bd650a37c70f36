"""An adapter's vocabulary among its numbers: laid out once on the host, and found again wherever the numbers lie."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onebase_adapters import adapter as stored
from onebase_server.engine.matrix_layout import MatrixWriter, Part
from onebase_server.model.arrays import as_tensor
from onebase_server.model.vocabulary import AdapterVocabulary, Pair, TokenRows


class PackedRows(NamedTuple):
    """Replaced rows of embedding or head."""

    tokens: Tensor
    vectors: Part

    def of(self, numbers: Tensor, tokens_on: torch.device) -> TokenRows:
        """The rows themselves."""
        return TokenRows(self.tokens.to(tokens_on), self.vectors.of(numbers))


class PackedPair(NamedTuple):
    """The matrices of `model.vocabulary.Pair`."""

    down: Part
    up: Part

    def of(self, numbers: Tensor) -> Pair:
        """The matrices themselves."""
        return Pair(self.down.of(numbers), self.up.of(numbers))


@dataclass(frozen=True, slots=True)
class PackedVocabulary:
    """Where an adapter's vocabulary lies among its numbers."""

    embedding_rows: PackedRows | None
    embedding_pair: PackedPair | None
    head_rows: PackedRows | None
    head_pair: PackedPair | None
    num_tokens: int
    num_sampled: int

    def of(self, numbers: Tensor) -> AdapterVocabulary:
        """The vocabulary in the adapter's numbers, which it does not copy."""
        host = torch.device("cpu")
        return AdapterVocabulary(
            embedding_rows=self.embedding_rows.of(numbers, host) if self.embedding_rows else None,
            embedding_pair=self.embedding_pair.of(numbers) if self.embedding_pair else None,
            head_rows=self.head_rows.of(numbers, numbers.device) if self.head_rows else None,
            head_pair=self.head_pair.of(numbers) if self.head_pair else None,
            num_tokens=self.num_tokens,
            num_sampled=self.num_sampled,
        )


def pack_vocabulary(vocabulary: stored.Vocabulary, vocab_size: int, writer: MatrixWriter) -> PackedVocabulary:
    """Put a vocabulary's vectors and pairs behind each other; `vocab_size` is the base's."""
    embedding, head = vocabulary.embedding, vocabulary.head
    embedding_rows = _put_rows(embedding.rows, writer)
    head_rows = embedding_rows if vocabulary.has_tied_rows else _put_rows(head.rows, writer)
    num_tokens = vocabulary.size or vocab_size
    samples_added = head.rows is not None and head.rows.tokens[-1] >= vocab_size
    return PackedVocabulary(
        embedding_rows=embedding_rows,
        embedding_pair=_put_pair(embedding.pair, writer, is_transposed=True),
        head_rows=head_rows,
        head_pair=_put_pair(head.pair, writer, is_transposed=False),
        num_tokens=num_tokens,
        num_sampled=num_tokens if samples_added else min(num_tokens, vocab_size),
    )


def _put_rows(rows: stored.TokenRows | None, writer: MatrixWriter) -> PackedRows | None:
    return None if rows is None else PackedRows(torch.from_numpy(rows.tokens), writer.put(as_tensor(rows.vectors)))


def _put_pair(pair: stored.LowRankPair | None, writer: MatrixWriter, *, is_transposed: bool) -> PackedPair | None:
    """`is_transposed`: A lies by columns, of which the embedding takes one for each token."""
    if pair is None:
        return None
    down = writer.put(as_tensor(pair.lora_a), is_transposed=is_transposed)
    return PackedPair(down, writer.put(as_tensor(pair.lora_b), scale=pair.scale))
