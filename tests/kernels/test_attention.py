"""Paged attention against torch's own, request by request, with everything unused poisoned by NaN."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import onebase_kernels as kernels
from onebase_kernels import AttentionBatch

HEAD_DIM = 32


class PagedRequests:
    """Requests with random keys and values, laid out in scattered blocks of a cache that is NaN elsewhere."""

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        heads: int,
        kv_heads: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Lengths are (query_len, context_len) per request."""
        torch.manual_seed(0)
        self.keys = [torch.randn(context, kv_heads, HEAD_DIM) for _, context in lengths]
        self.values = [torch.randn(context, kv_heads, HEAD_DIM) for _, context in lengths]
        self.q = torch.randn(sum(query for query, _ in lengths), heads, HEAD_DIM)
        counts = [-(-context // block_size) for _, context in lengths]
        free = torch.randperm(sum(counts) + 3, dtype=torch.int32)
        tables = torch.full((len(lengths), max(counts) + 1), free[-1].item(), dtype=torch.int32)
        for row, (stop, count) in enumerate(zip(torch.tensor(counts).cumsum(0).tolist(), counts, strict=True)):
            tables[row, :count] = free[stop - count : stop]
        cache_shape = (sum(counts) + 3, block_size, kv_heads, HEAD_DIM)
        self.k_cache, self.v_cache = kernels.allocate_kv(1, cache_shape, dtype, torch.get_default_device())[0]
        self.k_cache.fill_(torch.nan)
        self.v_cache.fill_(torch.nan)
        slots = []
        for row, (query, context) in enumerate(lengths):
            positions = torch.arange(context)
            where = tables[row, positions // block_size].long() * block_size + positions % block_size
            whole = AttentionBatch((0, context), (context,), tables[row : row + 1], where)
            kernels.write_kv_(self.keys[row].to(dtype), self.values[row].to(dtype), self.k_cache, self.v_cache, whole)
            slots.append(where[context - query :])
        starts = torch.tensor([0] + [query for query, _ in lengths]).cumsum(0).tolist()
        self.batch = AttentionBatch(tuple(starts), tuple(context for _, context in lengths), tables, torch.cat(slots))

    def expected(self, scale: float, window: int | None) -> Tensor:
        outputs = []
        starts = self.batch.query_starts
        for keys, values, start, stop in zip(self.keys, self.values, starts, starts[1:], strict=False):
            context, query = len(keys), stop - start
            visible = torch.ones(context, context, dtype=torch.bool).tril()
            if window is not None:
                visible &= ~torch.ones(context, context, dtype=torch.bool).tril(-window)
            out = F.scaled_dot_product_attention(
                self.q[start:stop].transpose(0, 1),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                attn_mask=visible[context - query :],
                scale=scale,
                enable_gqa=True,
            )
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)


BATCHES = {
    "one token of one": [(1, 1)],
    "decode, lengths far apart": [(1, 1), (1, 37), (1, 5), (1, 16), (1, 90)],
    "whole prompts": [(5, 5), (17, 17)],
    "a later chunk of a prompt": [(7, 30)],
    "a prompt longer than a piece": [(300, 310)],
    "prefill and decode mixed": [(1, 20), (13, 13), (1, 3), (9, 44)],
}


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_each_token_sees_its_own_request_up_to_itself(
    backend: str, lengths: list[tuple[int, int]], heads: tuple[int, int], window: int | None
) -> None:
    requests = PagedRequests(lengths, *heads, block_size=4)
    out = kernels.paged_attention(
        requests.q, requests.k_cache, requests.v_cache, requests.batch, scale=0.3, window=window
    )
    torch.testing.assert_close(out, requests.expected(0.3, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
@pytest.mark.parametrize(("heads", "block_size", "window"), [((6, 2), 4, None), ((6, 2), 16, 6), ((20, 1), 32, None)])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_bfloat16_stays_near_float32(
    backend: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{__name__}.HEAD_DIM", head_dim)
    requests = PagedRequests(lengths, *heads, block_size=block_size, dtype=torch.bfloat16)
    out = kernels.paged_attention(
        requests.q.bfloat16(),
        requests.k_cache,
        requests.v_cache,
        requests.batch,
        scale=0.3,
        window=window,
    )
    assert out.dtype == torch.bfloat16
    expected = requests.expected(0.3, window)
    assert (out.float() - expected).norm() < 1e-2 * expected.norm()


def capped_attention(requests: PagedRequests, scale: float, window: int | None, softcap: float) -> Tensor:
    """Attention with a softcap, request by request, as the Gemma 2 report (arXiv 2408.00118) writes it."""
    outputs, starts = [], requests.batch.query_starts
    for keys, values, start, stop in zip(requests.keys, requests.values, starts, starts[1:], strict=False):
        q, group = requests.q[start:stop], requests.q.shape[1] // keys.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, keys.repeat_interleave(group, dim=1)) * scale
        distances = torch.arange(len(keys) - len(q), len(keys)).unsqueeze(1) - torch.arange(len(keys))
        is_hidden = (distances < 0) | (distances >= (window or len(keys)))
        weights = (softcap * torch.tanh(scores / softcap)).masked_fill(is_hidden, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, dim=1)))
    return torch.cat(outputs)


@pytest.mark.parametrize("head_dim", [20, 32, 256])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_scores_are_capped_softly(
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    window: int | None,
    head_dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{__name__}.HEAD_DIM", head_dim)
    requests = PagedRequests(BATCHES["prefill and decode mixed"], 6, 2, block_size=16)
    operands = (tensor.to(dtype) for tensor in (requests.q, requests.k_cache, requests.v_cache))
    out = kernels.paged_attention(*operands, requests.batch, scale=0.3, window=window, softcap=1.5)
    expected = capped_attention(requests, 0.3, window, 1.5)
    assert (out.float() - expected).norm() < tolerance * expected.norm()
    uncapped = requests.expected(0.3, window)
    assert (uncapped - expected).norm() > 10 * tolerance * expected.norm()  # the cap shows


def test_q_may_be_a_slice_of_a_wider_tensor(backend: str) -> None:
    requests = PagedRequests(BATCHES["prefill and decode mixed"], 6, 2, block_size=4)
    wide = torch.cat([requests.q, torch.full_like(requests.q, torch.nan)], dim=1)
    out = kernels.paged_attention(wide[:, :6], requests.k_cache, requests.v_cache, requests.batch, scale=0.3)
    torch.testing.assert_close(out, requests.expected(0.3, None), rtol=1e-4, atol=1e-5)


def test_a_head_size_that_vectors_do_not_divide_is_carried_all_the_same(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.HEAD_DIM", 20)
    requests = PagedRequests(BATCHES["prefill and decode mixed"], 6, 2, block_size=4)
    out = kernels.paged_attention(requests.q, requests.k_cache, requests.v_cache, requests.batch, scale=0.3)
    torch.testing.assert_close(out, requests.expected(0.3, None), rtol=1e-4, atol=1e-5)
