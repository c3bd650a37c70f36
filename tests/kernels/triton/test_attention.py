"""What the tests of all back ends do not reach: splits of the keys, half precisions, tiles that are skipped."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onebase_kernels import AttentionBatch, reference
from onebase_kernels.triton import attention

KV_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 16, 4

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 keys and tiles of 16 rows, so that short requests have several."""
    monkeypatch.setattr(attention, "_PREFILL_ROWS", 16)
    monkeypatch.setattr(attention, "_DECODE_SPLIT", 64)
    monkeypatch.setattr(attention, "_PREFILL_SPLIT", 64)


class Step:
    """Requests of (query_len, context_len) with random queries, keys and values in scattered blocks."""

    def __init__(self, lengths: list[tuple[int, int]], group: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        counts = [-(-context // BLOCK_SIZE) for _, context in lengths]
        cache_shape = (sum(counts), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        self.k_cache, self.v_cache = torch.randn(cache_shape).to(dtype), torch.randn(cache_shape).to(dtype)
        blocks = iter(torch.randperm(sum(counts)).split(counts))
        tables = torch.nn.utils.rnn.pad_sequence([*blocks], batch_first=True).int()
        starts = tuple(torch.tensor([0] + [query for query, _ in lengths]).cumsum(0).tolist())
        self.q = torch.randn(starts[-1], group * KV_HEADS, HEAD_DIM).to(dtype)
        self.batch = AttentionBatch(starts, tuple(context for _, context in lengths), tables, torch.zeros(starts[-1]))

    def attend(self, window: int | None = None) -> Tensor:
        return attention.paged_attention(self.q, self.k_cache, self.v_cache, self.batch, 0.3, window)

    def expected(self, window: int | None = None) -> Tensor:
        operands = (self.q.float(), self.k_cache.float(), self.v_cache.float())
        return reference.paged_attention(*operands, self.batch, 0.3, window)


@pytest.mark.parametrize(("group", "window"), [(1, None), (3, 100), (8, None)])
def test_splits_of_the_keys_are_joined(short_splits: None, group: int, window: int | None) -> None:
    step = Step([(1, 200), (6, 170), (1, 64), (1, 65), (2, 2)], group)
    torch.testing.assert_close(step.attend(window), step.expected(window), rtol=1e-4, atol=1e-5)


def test_a_context_of_many_splits_gets_longer_ones(short_splits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MAX_SPLITS", 2)
    step = Step([(1, 500), (1, 70)], group=2)
    torch.testing.assert_close(step.attend(), step.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precisions_stay_near_float32(short_splits: None, dtype: torch.dtype, tolerance: float) -> None:
    step = Step([(1, 100), (6, 90)], group=4, dtype=dtype)
    assert step.attend().dtype == dtype
    torch.testing.assert_close(step.attend().float(), step.expected(), rtol=tolerance, atol=tolerance)


def test_a_request_gets_the_same_bits_whatever_else_is_in_the_step(short_splits: None) -> None:
    step = Step([(1, 150), (1, 300), (9, 70)], group=2)
    together = step.attend()
    step.q = step.q[:1]
    step.batch = AttentionBatch((0, 1), (150,), step.batch.block_tables[:1], step.batch.slot_mapping[:1])
    assert torch.equal(step.attend(), together[:1])


def test_a_tile_without_queries_is_skipped(short_splits: None) -> None:
    step = Step([(1, 100), (1, 90)], group=2)
    (tiles,) = attention.plan(step.batch, 2, None)
    tiles.table[1] = 0
    attended = step.attend()
    torch.testing.assert_close(attended[:1], step.expected()[:1], rtol=1e-4, atol=1e-5)
    assert attended[1].isnan().all()


def test_a_captured_step_can_be_given_longer_contexts(short_splits: None) -> None:
    captured = Step([(1, 200), (1, 200)], group=2)
    later = replace(captured.batch, context_lens=(30, 140))
    expected = reference.paged_attention(captured.q, captured.k_cache, captured.v_cache, later, 0.3)
    (tiles,), (later_tiles,) = (attention.plan(batch, 2, None) for batch in (captured.batch, later))
    tiles.table.copy_(later_tiles.table)
    torch.testing.assert_close(captured.attend(), expected, rtol=1e-4, atol=1e-5)
