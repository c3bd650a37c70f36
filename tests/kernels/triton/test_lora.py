"""What the tests of all back ends do not reach: large ranks, long segments, half precisions, tiles that are skipped."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from onebase_kernels import LoraBatch, Segment, int8_matrices, reference
from onebase_kernels.triton import lora

IN_FEATURES, WIDTHS = 80, (32, 16, 24)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def adapters(ranks: Sequence[tuple[int, int, int]], segments: Sequence[Segment], alignment: int = 1) -> LoraBatch:
    """A slot for each of `ranks`, amid NaN."""
    torch.manual_seed(0)
    chunks, rows, offset = [], [], 0
    for slot_ranks in ranks:
        size = sum(rank * (IN_FEATURES + width) for rank, width in zip(slot_ranks, WIDTHS, strict=True))
        rows.append((offset, *slot_ranks, 0))
        chunks += [torch.randn(size), torch.full((alignment,), torch.nan)]
        offset += size + alignment
    return LoraBatch(torch.cat(chunks), torch.tensor([rows]), tuple(segments), alignment=alignment)


def side_path(batch: LoraBatch, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What the kernels and what the reference in fp32 make of the same random numbers."""
    torch.manual_seed(1)
    x, y = (torch.randn(rows, size).to(dtype) for size in (IN_FEATURES, sum(WIDTHS)))
    arena = batch.arena.to(dtype)
    expected = y.float()
    wide = LoraBatch(arena.float(), batch.table, batch.segments)
    reference.add_lora_(expected, x.float(), wide, 0, WIDTHS)
    narrow = LoraBatch(arena, batch.table, batch.segments, batch.max_rank, batch.alignment)
    lora.add_lora_(y, x, narrow, 0, WIDTHS)
    return y, expected


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("ranks", [(8, 0, 40), (100, 3, 17), (0, 0, 0)])
def test_ranks_may_be_more_than_one_block_of_them(ranks: tuple[int, int, int], alignment: int) -> None:
    found, expected = side_path(adapters([ranks], [Segment(0, 1, 3)], alignment), rows=4)
    assert relative_error(found, expected) < 1e-6


def test_long_segments_go_by_larger_tiles_and_short_ones_with_them() -> None:
    batch = adapters([(4, 16, 1), (33, 0, 2)], [Segment(1, 0, 1), Segment(0, 3, 42), Segment(1, 42, 44)])
    assert lora.plan(batch).tiling.tokens == 32
    found, expected = side_path(batch, rows=45)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("bytes_at_a_time", [64, 128])
def test_inputs_are_summed_over_all_splits(monkeypatch: pytest.MonkeyPatch, bytes_at_a_time: int) -> None:
    monkeypatch.setattr(lora, "_INPUT_BYTES", bytes_at_a_time)
    found, expected = side_path(adapters([(4, 8, 4)], [Segment(0, 0, 2)]), rows=2)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_half_precisions_stay_near_float32(dtype: torch.dtype, tolerance: float) -> None:
    found, expected = side_path(adapters([(16, 8, 8)], [Segment(0, 0, 3)]), rows=3, dtype=dtype)
    assert relative_error(found, expected) < tolerance


def test_a_tile_of_slot_minus_one_is_skipped() -> None:
    batch = adapters([(4, 4, 4), (8, 8, 8)], [Segment(0, 0, 1), Segment(1, 1, 2)])
    lora.plan(batch).table[1, 0] = -1
    y = torch.zeros(2, sum(WIDTHS))
    lora.add_lora_(y, torch.ones(2, IN_FEATURES), batch, 0, WIDTHS)
    assert y[0].all()
    assert not y[1].any()


def test_the_most_ranks_are_asked_of_the_table_unless_they_are_given() -> None:
    batch = adapters([(4, 4, 4), (8, 1, 8)], [Segment(0, 0, 1)])
    assert lora.plan(batch).max_rank == 17
    assert lora.plan(LoraBatch(batch.arena, batch.table, batch.segments, max_rank=12)).max_rank == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_compute_what_the_reference_makes_of_them_in_tiles_large_and_small(dtype: torch.dtype) -> None:
    ranks, line = (33, 3, 20), int8_matrices.LINE_BYTES // dtype.itemsize
    total_rank, offset = sum(ranks), 2 * line
    shapes = ((total_rank, IN_FEATURES), *zip(ranks, WIDTHS, strict=True))
    start, scales = offset + int8_matrices.scales_size(total_rank, dtype), offset
    arena = torch.full((16384,), torch.nan, dtype=dtype)
    torch.manual_seed(0)
    for rows, columns in shapes:
        int8_matrices.encode_(arena, start, scales, torch.randn(rows, columns))
        start += rows * columns // dtype.itemsize
        scales += rows * torch.float32.itemsize // dtype.itemsize
    table = torch.tensor([[(offset, *ranks, 0)]])
    for segments in ((Segment(0, 1, 3),), (Segment(0, 0, 1), Segment(0, 2, 42))):
        batch = LoraBatch(arena, table, segments, alignment=line, is_int8=True)
        x, y = (torch.randn(45, size).to(dtype) for size in (IN_FEATURES, sum(WIDTHS)))
        expected = y.clone()
        reference.add_lora_(expected, x, batch, 0, WIDTHS)
        lora.add_lora_(y, x, batch, 0, WIDTHS)
        assert relative_error(y, expected.float()) < (1e-6 if dtype == torch.float32 else 5e-3)
