"""An adapter laid out as the kernels read it: one flat run of numbers and a table of where each group's lie.

The layout is the contract of `onebase_kernels.add_lora_`. It knows nothing of the arena that the run is copied into.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_adapters.adapter import ALIGNMENT, Adapter, ModuleKey
from onebase_kernels import TABLE_COLUMNS, Matrix
from onebase_server.engine.epilogue import gain_and_shift
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.matrix_layout import MatrixWriter
from onebase_server.engine.norm_packing import PackedNorms, pack_norms
from onebase_server.engine.vocabulary_packing import PackedVocabulary, pack_vocabulary
from onebase_server.model.config import ModelConfig
from onebase_server.model.linear import LinearGroup

RANKS = slice(1, 4)
"""The columns of the table that hold ranks."""
MAX_SLICES = RANKS.stop - RANKS.start


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in the kernels' layout, on the host."""

    numbers: Tensor
    """1-D, compute dtype."""
    table: Tensor
    """int64 [layers, groups, 5]; offsets count from the start of `numbers`."""
    vocabulary: PackedVocabulary | None = None
    norms: PackedNorms | None = None

    @property
    def max_rank(self) -> int:
        """The most ranks at one place, all slices of the group together."""
        return int(self.table[..., RANKS].sum(dim=-1).max())


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an adapter's matrices are to lie, and what `PackedAdapter` has beside its numbers."""

    matrices: tuple[Matrix, ...]
    num_numbers: int
    table: Tensor
    vocabulary: PackedVocabulary | None
    norms: PackedNorms | None


def pack_adapter(
    adapter: Adapter, config: ModelConfig, matrix_format: MatrixFormat, base: Sequence[LinearGroup]
) -> PackedAdapter:
    """An adapter as `lay_out` lays it out."""
    layout = lay_out(adapter, config, matrix_format, base)
    numbers = torch.empty(layout.num_numbers, dtype=matrix_format.dtype)
    kernels.copy_matrices_(numbers, layout.matrices)
    return PackedAdapter(numbers, layout.table, layout.vocabulary, layout.norms)


def lay_out(adapter: Adapter, config: ModelConfig, matrix_format: MatrixFormat, base: Sequence[LinearGroup]) -> Layout:
    """Per layer and projection group: the slices' A stacked [Σrᵢ, in], then each slice's s·B transposed [rᵢ, outᵢ],
    as `matrix_format` has them, then gain and shift [2, outᵢ] of each slice that has an epilogue. Behind all of them
    lie vocabulary and norms.

    `base` holds the base's groups by place, for what an epilogue needs of them.
    """
    rows: list[tuple[int, ...]] = []
    matrices: list[Matrix] = []
    alignment = matrix_format.alignment(config)
    end = num_placed = 0
    for layer in range(config.num_layers):
        for group in config.projection_groups:
            keys = [ModuleKey(layer, projection, group.expert) for projection in group.projections]
            pairs = [adapter.pairs.get(key) for key in keys]
            ranks = [pair.rank if pair else 0 for pair in pairs] + [0] * (MAX_SLICES - len(pairs))
            vectors = {
                i: gain_and_shift(adapter.epilogues[key], pairs[i], base[len(rows)], i)
                for i, key in enumerate(keys)
                if key in adapter.epilogues
            }
            rows.append((end, *ranks, sum(1 << i for i in vectors)))
            placed, end = matrix_format.place(list(filter(None, pairs)), end)
            matrices += placed
            for both in vectors.values():
                matrices.append(Matrix(both, end))
                end += both.numel()
            end += -end % alignment
            num_placed += len(list(filter(None, pairs))) + len(vectors)
    vocabulary, norms = None, None
    if adapter.vocabulary or adapter.norms:
        writer = MatrixWriter(matrices, end)
        vocabulary = pack_vocabulary(adapter.vocabulary, config.vocab_size, writer) if adapter.vocabulary else None
        norms = pack_norms(adapter.norms, config, writer) if adapter.norms else None
        end += -(-(writer.end - end) // ALIGNMENT) * ALIGNMENT
        end += -end % alignment
    assert num_placed == len(adapter.pairs) + len(adapter.epilogues), "each belongs to one of the base's projections"
    table = torch.tensor(rows).view(config.num_layers, -1, TABLE_COLUMNS)
    return Layout(tuple(matrices), end, table, vocabulary, norms)
