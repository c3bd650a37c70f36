"""What a step looks like to the ops: plain descriptions of who owns which tokens. It computes nothing.

The tokens of all requests of a step lie one after another without padding; T is their number, S the requests'.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Consecutive tokens of a step, `start:stop`, that use the adapter in one slot."""

    slot: int
    start: int
    stop: int


TABLE_COLUMNS = 5
"""Of a row of `LoraBatch.table`."""


class Matrix(NamedTuple):
    """One of an adapter's matrices or vectors, to be laid out as `add_lora_` reads it."""

    source: Tensor
    """[rows, columns] on the host, in any dtype."""
    offset: int
    """Where it begins in the target."""
    scale: float = 1.0
    """What it is multiplied by, before it is rounded to the target's dtype."""
    is_transposed: bool = False
    scales: int | None = None
    """Where the fp32 scales of its rows begin, if it is to be kept in 8 bits: by numbers of the target, as `offset`."""


class FileMatrix(NamedTuple):
    """The same where it lies in a file; `Matrix` says the rest."""

    start: int
    """Bytes from the file's beginning."""
    rows: int
    columns: int
    dtype: torch.dtype
    offset: int
    scale: float = 1.0
    is_transposed: bool = False
    scales: int | None = None

    def of(self, file: Tensor) -> Matrix:
        """The matrix of a file that is given as its bytes."""
        end = self.start + self.rows * self.columns * self.dtype.itemsize
        source = file[self.start : end].view(self.dtype).view(self.rows, self.columns)
        return Matrix(source, self.offset, self.scale, self.is_transposed, self.scales)


@dataclass(frozen=True, eq=False)
class FilePlan:
    """How all files that are alike but for their numbers are laid out; a back end may keep what it makes of a plan."""

    matrices: tuple[FileMatrix, ...]


@dataclass(frozen=True, eq=False)
class LoraBatch:
    """Which tokens of the step use which adapter, and where adapters lie; `add_lora_` says how they are laid out."""

    arena: Tensor
    """[E], in the compute dtype: the numbers of all adapters in device memory."""
    table: Tensor
    """int64 [places, slots, 5]: for each group of each layer, each slot's `(offset, r₀, r₁, r₂, epilogues)`."""
    segments: tuple[Segment, ...]
    """In the order of the step; tokens without an adapter are in none."""
    max_rank: int | None = None
    """No adapter of the step has more ranks at one place, all slices together; None, and the device has to be asked."""
    alignment: int = 1
    """What every offset in the table is a multiple of: a power of two, for rows to be read in whole vectors."""
    is_int8: bool = False
    """Whether all A and B are kept in 8 bits."""

    @classmethod
    def empty(cls, dtype: torch.dtype, device: torch.device) -> "LoraBatch":
        """No adapter for any token."""
        table = torch.empty(0, 0, TABLE_COLUMNS, dtype=torch.int64, device=device)
        return cls(torch.empty(0, dtype=dtype, device=device), table, segments=())


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Where each request's tokens stand in the step and in the paged KV cache."""

    query_starts: tuple[int, ...]
    """S + 1 offsets: the tokens of request s are `query_starts[s]:query_starts[s + 1]`, at least one each."""
    context_lens: tuple[int, ...]
    """S lengths: tokens of request s in the cache once this step's are written; its queries are the last of them."""
    block_tables: Tensor
    """int32 [S, max_blocks]: the cache blocks of each request in order; entries past its last block are not read."""
    slot_mapping: Tensor
    """int64 [T]: where each token of the step is written, `block * block_size + offset`."""

    @cached_property
    def query_lens(self) -> tuple[int, ...]:
        """S counts: how many tokens of the step each request has."""
        return tuple(stop - start for start, stop in zip(self.query_starts, self.query_starts[1:], strict=False))


@dataclass(frozen=True, eq=False)
class ReplacedRows:
    """Tokens of the step whose embeddings are not those of the base's table."""

    rows: Tensor
    """int64 [n]: where they stand in the step."""
    vectors: Tensor
    """[n, K], in the compute dtype: their embeddings."""

    def to(self, device: torch.device) -> "ReplacedRows":
        """The same on `device`."""
        return ReplacedRows(self.rows.to(device), self.vectors.to(device))


@dataclass(frozen=True, eq=False)
class StepInputs:
    """All that a step computes from, besides what stays the same: weights, caches, adapters' numbers."""

    token_ids: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T], of each token in its request."""
    attention: AttentionBatch
    lora: LoraBatch
    replaced: ReplacedRows | None = None
    """None where all embeddings are the table's."""

    def to(self, device: torch.device) -> "StepInputs":
        """The same with the step's own tensors on `device`; the adapters are where they are."""
        if self.token_ids.device == device:
            return self
        batch = self.attention
        moved = replace(batch, block_tables=batch.block_tables.to(device), slot_mapping=batch.slot_mapping.to(device))
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            attention=moved,
            replaced=self.replaced.to(device) if self.replaced else None,
        )


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """How the next token of each of R rows of logits is chosen."""

    temperature: Tensor
    """fp32 [R]; 0 takes the best token."""
    top_k: Tensor
    """int64 [R]; 0 for no limit."""
    top_p: Tensor
    """fp32 [R]; 1 for no limit."""
    min_p: Tensor
    """fp32 [R]; 0 for no limit."""
    uniform: Tensor
    """fp64 [R], in [0, 1): the row's random number."""
