"""Decode steps from buffers that stay, filled up to a bucket: what graphs replay, and on a GPU graphs themselves."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import Segment, StepInputs
from onebase_kernels.triton import graphs
from onebase_kernels.triton.attention import DecodeBatch
from onebase_kernels.triton.graphs import BUCKETS, DecodeGraphs, NotCapturable, buckets_for
from onebase_kernels.triton.plans import default_plan

from ..small_model import BLOCKS, SmallModel

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CONTEXTS, TABLES = [7, 1, 10, 4, 3], [[3, 5, 0], [1, 0, 0], [2, 7, 4], [6, 0, 0], [0, 0, 0]]


@pytest.fixture(autouse=True)
def _triton(triton_device: None) -> Iterator[None]:
    kernels.use_backend("triton", torch.get_default_device().type)
    yield
    kernels.use_backend("reference")


class Recorded:
    """A small model whose steps go through graphs, and what each call of its forward was given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model = SmallModel(dtype)
        for caches in (self.model.k_caches, self.model.v_caches):
            caches.normal_()
        self.seen: list[StepInputs] = []
        self.run = DecodeGraphs(self.forward, self.model.largest_step())
        self.seen.clear()

    def forward(self, inputs: StepInputs) -> Tensor:
        self.seen.append(inputs)
        return self.model.forward(inputs)

    def decode(self, requests: int, segments: Sequence[Segment] = ()) -> StepInputs:
        return self.model.step([9] * requests, CONTEXTS[:requests], TABLES[:requests], segments)

    def check(self, step: StepInputs, tolerance: float = 1e-5) -> None:
        """The step makes the same of the same caches as when it is computed op by op, result and caches."""
        caches = (self.model.k_caches, self.model.v_caches)
        before = [cache.clone() for cache in caches]
        expected = self.model.forward(step)
        written = [cache.clone() for cache in caches]
        for cache, copy in zip(caches, before, strict=True):
            cache.copy_(copy)
        torch.testing.assert_close(self.run(step), expected, rtol=tolerance, atol=tolerance)
        for cache, copy in zip(caches, written, strict=True):
            torch.testing.assert_close(cache, copy, rtol=tolerance, atol=tolerance)


def test_a_bucket_cuts_no_product_otherwise_than_the_step_itself() -> None:
    for tokens in range(1, BUCKETS[-1] + 1):
        plans = [default_plan(rows, 4096, 4096, processors=132) for rows in (tokens, buckets_for(tokens)[-1])]
        assert plans[0] == plans[1], tokens


@pytest.mark.parametrize(("most", "buckets"), [(1, (1,)), (3, (1, 2, 4)), (17, (1, 2, 4, 8, 16, 24)), (999, BUCKETS)])
def test_there_are_buckets_for_all_steps_up_to_the_largest(most: int, buckets: tuple[int, ...]) -> None:
    assert buckets_for(most) == buckets


def test_steps_one_after_another_are_what_they_are_op_by_op() -> None:
    """Sizes, contexts and adapters change: nothing of a step remains in the next."""
    recorded = Recorded()
    recorded.check(recorded.decode(5, [Segment(1, 0, 2), Segment(0, 3, 5)]))
    recorded.check(recorded.decode(3))
    recorded.check(recorded.decode(5, [Segment(0, 2, 3)]))
    recorded.check(recorded.decode(1, [Segment(1, 0, 1)]))
    recorded.check(recorded.decode(5))


def test_adapters_may_be_kept_in_8_bits() -> None:
    recorded = Recorded()
    recorded.model.keep_adapters_in_8_bits()
    recorded.run = DecodeGraphs(recorded.forward, recorded.model.largest_step())
    recorded.check(recorded.decode(5, [Segment(1, 0, 2), Segment(0, 3, 5)]))


def test_half_precision_goes_through_the_fused_product() -> None:
    recorded = Recorded(torch.bfloat16)
    recorded.check(recorded.decode(3, [Segment(1, 0, 2)]), tolerance=2e-2)


def test_a_segment_may_be_more_than_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DECODE_TOKENS", 2)
    recorded = Recorded()
    recorded.check(recorded.decode(5, [Segment(0, 0, 5)]))


def test_the_table_of_adapters_may_grow_and_lie_elsewhere() -> None:
    recorded = Recorded()
    step = recorded.decode(2, [Segment(3, 0, 2)])
    recorded.check(replace(step, lora=replace(step.lora, table=recorded.model.adapters.repeat(1, 2, 1))))


def test_only_steps_in_which_all_requests_decode_are_filled_up() -> None:
    recorded = Recorded()
    prefill = recorded.model.step([1, 2, 3], [3, 7], [[6, 0], [3, 5]], query_lens=[2, 1])
    wide = recorded.model.step([1], [7], [[3, 5] + [0] * BLOCKS])
    many = recorded.decode(2, [Segment(1, 0, 1)])
    many = replace(many, lora=replace(many.lora, max_rank=graphs.MAX_RANK + 1))
    for step in (prefill, wide, many):
        recorded.check(step)
        assert not isinstance(recorded.seen[-1].attention, DecodeBatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph does not call it again")
def test_steps_of_a_bucket_are_computed_from_the_same_memory() -> None:
    recorded = Recorded()
    for requests in (3, 4):
        recorded.run(recorded.decode(requests, [Segment(1, 0, 1)]))
    first, second = recorded.seen
    assert first is second
    assert len(first.token_ids) == 4
    assert isinstance(first.attention, DecodeBatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_graph_is_replayed_without_python() -> None:
    recorded = Recorded()
    recorded.check(recorded.decode(3, [Segment(1, 0, 2)]))
    assert not recorded.seen


def test_steps_that_compile_prefill_write_nothing() -> None:
    recorded = Recorded()
    before = [cache.clone() for cache in (recorded.model.k_caches, recorded.model.v_caches)]
    largest = recorded.model.step([0] * 20, [32, 32], [list(range(BLOCKS))] * 2, query_lens=[1, 19])
    steps = list(graphs.prefill_steps(largest))
    sizes = [(len(step.token_ids), step.attention.context_lens[1]) for step in steps]
    assert sizes == [(16, 16), (16, 32), (20, 20), (20, 32)]
    for step in steps:
        recorded.model.forward(step)
    for cache, copy in zip((recorded.model.k_caches, recorded.model.v_caches), before, strict=True):
        assert torch.equal(cache, copy)


def test_what_only_the_device_knows_never_reaches_an_op_that_asks_the_host() -> None:
    model = SmallModel()
    model.arena = model.arena.half()  # which the kernels do not mix with fp32
    step = model.step([9], [7], [[3, 5]], [Segment(1, 0, 1)])
    with pytest.raises(NotCapturable, match="DecodeLoraBatch says on the device alone who is in the step"):
        DecodeGraphs(model.forward, model.largest_step())(step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_forward_that_waits_for_the_device_is_computed_op_by_op() -> None:
    model = SmallModel()

    def forward(inputs: StepInputs) -> Tensor:
        inputs.token_ids.max().item()
        return model.forward(inputs)

    with pytest.warns(UserWarning, match="There are no CUDA graphs for this model"):
        recorded = kernels.record(forward, model.largest_step())
    step = model.step([9], [1], [[3]])
    torch.testing.assert_close(recorded(step), model.forward(step))


def test_a_model_whose_steps_cannot_be_captured_is_computed_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SmallModel()
    monkeypatch.setattr(graphs.DecodeStep, "__init__", failing(NotCapturable("operation not permitted")))
    with pytest.warns(UserWarning, match="There are no CUDA graphs for this model, .*: operation not permitted"):
        recorded = kernels.record(model.forward, model.largest_step())
    step = model.step([9], [1], [[3]])
    torch.testing.assert_close(recorded(step), model.forward(step))


def test_a_capture_that_fails_is_told_from_a_device_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SmallModel()
    step = graphs.DecodeStep(model.forward, 2, model.largest_step(), has_adapters=True)
    of_ending = RuntimeError("a previous error during capture")
    of_ending.__context__ = RuntimeError("operation not permitted")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for error in (RuntimeError("operation not permitted"), of_ending):
        monkeypatch.setattr(graphs, "CapturedGraph", failing(error))
        with pytest.raises(NotCapturable, match="operation not permitted"):
            step.capture(pool=None)
    monkeypatch.setattr(torch.cuda, "synchronize", failing(RuntimeError("an illegal memory access")))
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        step.capture(pool=None)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def test_a_step_may_lie_on_the_host() -> None:
    recorded = Recorded()
    for step in (recorded.decode(2), recorded.model.step([1, 2], [2], [[6]], query_lens=[2])):
        on_host = step.to(torch.device("cpu"))
        expected = recorded.model.forward(step)
        torch.testing.assert_close(recorded.run(on_host), expected, rtol=1e-5, atol=1e-5)
