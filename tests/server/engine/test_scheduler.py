"""The scheduler, without a model: budgets, blocks, admission, preemption and ends."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_server.engine.block_pool import BlockPool
from onebase_server.engine.request import AdapterRef, SamplingParams, Submit, TokenOutput
from onebase_server.engine.scheduler import (
    MAX_HELD_SECONDS,
    MAX_TIMES_PASSED,
    AdapterLoading,
    AdapterMemoryFull,
    AdapterUnusable,
    Batch,
    Sampled,
    Scheduler,
)
from onebase_server.engine.sequence import Sequence

EOS = 0


class Shelf:
    """Adapter memory of a few slots: digests are there one step after they were first asked for."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.users: dict[str, int] = {}
        self.asked: set[str] = set()
        self.loaded: set[str] = set()

    def load(self) -> None:
        """What was asked for comes."""
        self.loaded |= self.asked

    def is_ready(self, adapter: AdapterRef) -> bool:
        self.asked.add(adapter.digest)
        return adapter.digest in self.loaded

    def acquire(self, adapter: AdapterRef) -> int:
        if adapter.digest == "broken":
            raise AdapterUnusable("Adapter broken@1 could not be loaded.")
        if not self.is_ready(adapter):
            raise AdapterLoading
        if adapter.digest not in self.users and len(self.users) == self.slots:
            raise AdapterMemoryFull
        self.users[adapter.digest] = self.users.get(adapter.digest, 0) + 1
        return sorted(self.users).index(adapter.digest)

    def release(self, adapter: AdapterRef) -> None:
        self.users[adapter.digest] -= 1
        if not self.users[adapter.digest]:
            del self.users[adapter.digest]

    def withdraw(self, adapter: AdapterRef) -> None:
        self.asked.discard(adapter.digest)
        self.loaded.discard(adapter.digest)

    def prefix_blocks(self, adapter: AdapterRef) -> list[int]:
        return []

    def copy_block(self, source: int, target: int) -> None:
        raise AssertionError("no adapter here is a prefix")


def make_scheduler(*, clock: Callable[[], float] = time.monotonic, **overrides: int) -> Scheduler:
    options = {"num_blocks": 16, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, "slots": 2}
    options |= overrides
    return Scheduler(
        BlockPool(options["num_blocks"], options["block_size"]),
        Shelf(options["slots"]),
        clock=clock,
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        max_model_len=options.get("max_model_len", 64),
        prefix_cache=bool(options.get("prefix_cache", True)),
    )


def add(
    scheduler: Scheduler, name: str, prompt: list[int], adapter: str | None = None, max_tokens: int = 4
) -> Sequence:
    message = Submit(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, seed=1),
        adapter=AdapterRef.of_version(digest=adapter, path="", label=adapter) if adapter else None,
    )
    sequence = Sequence.from_submit(message, arrival=0.0)
    scheduler.add(sequence)
    return sequence


def next_token(sequence: Sequence) -> int:
    """What a deterministic model would say: it depends on all tokens so far."""
    return 1 + sum(sequence.token_ids) % 97


def step(scheduler: Scheduler, token: int | None = None) -> tuple[dict[str, tuple[int, int]], list[TokenOutput]]:
    """One step; what was computed, as {name: (start, stop)}, and what came out."""
    batch = scheduler.schedule()
    assert isinstance(scheduler.adapters, Shelf)
    scheduler.adapters.load()
    chosen = [next_token(e.sequence) if token is None else token for e in batch.scheduled]
    sampled = [Sampled(t if e.samples else None) for t, e in zip(chosen, batch.scheduled, strict=True)]
    outputs = scheduler.update(batch, sampled)
    scheduler.check()
    return spans(batch), outputs


def spans(batch: Batch) -> dict[str, tuple[int, int]]:
    return {entry.sequence.request_id: (entry.start, entry.stop) for entry in batch.scheduled}


def test_a_long_prompt_is_computed_in_chunks_beside_running_decodes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    add(scheduler, "short", [1, 2])
    assert step(scheduler)[0] == {"short": (0, 2)}
    add(scheduler, "long", list(range(1, 13)))
    assert step(scheduler)[0] == {"short": (2, 3), "long": (0, 5)}
    assert step(scheduler)[0] == {"short": (3, 4), "long": (5, 10)}


def test_a_chunked_prompt_gives_no_token_before_its_last_chunk() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, "a", list(range(1, 11)))
    counts = [len(step(scheduler)[1]) for _ in range(3)]
    assert counts == [0, 0, 1]


def test_a_prompt_that_starts_like_an_earlier_one_computes_only_the_rest() -> None:
    scheduler = make_scheduler()
    add(scheduler, "first", list(range(1, 11)), max_tokens=1)
    step(scheduler)
    second = add(scheduler, "second", [*range(1, 9), 50, 51])
    assert step(scheduler)[0] == {"second": (8, 10)}
    assert second.num_cached_tokens == 8


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    scheduler = make_scheduler()
    for name in ("first", "again"):
        add(scheduler, name, list(range(1, 9)), max_tokens=1)
        computed, outputs = step(scheduler)
    assert computed == {"again": (4, 8)}
    assert outputs[0].num_cached_tokens == 4


def test_without_prefix_cache_every_prompt_is_computed() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    for name in ("first", "again"):
        add(scheduler, name, list(range(1, 9)), max_tokens=1)
        assert step(scheduler)[0] == {name: (0, 8)}


def test_adapters_do_not_share_prefixes() -> None:
    scheduler = make_scheduler()
    for name, adapter in (("base", None), ("a", "a"), ("b", "b")):
        add(scheduler, name, list(range(1, 9)), adapter, max_tokens=1)
        while scheduler.has_work:
            step(scheduler)
    assert scheduler.prefix_cache_hits == 0


def test_the_batch_is_ordered_by_adapter_slot_with_the_base_first() -> None:
    scheduler = make_scheduler()
    for name, adapter in (("1", "b"), ("2", None), ("3", "a"), ("4", "b"), ("5", None)):
        add(scheduler, name, [1, 2, 3], adapter)
    step(scheduler)
    slots = [entry.sequence.slot for entry in scheduler.schedule().scheduled]
    assert slots == sorted(slots)
    assert slots[:2] == [-1, -1]


def test_sequences_overtake_one_whose_adapter_is_still_loading() -> None:
    scheduler = make_scheduler()
    add(scheduler, "adapted", [1, 2], "a")
    add(scheduler, "base", [3, 4])
    assert step(scheduler)[0] == {"base": (0, 2)}
    assert step(scheduler)[0] == {"base": (2, 3), "adapted": (0, 2)}


def test_prompts_that_came_together_are_computed_together_once_their_adapters_are_there() -> None:
    scheduler = make_scheduler(clock=lambda: MAX_HELD_SECONDS / 2)
    add(scheduler, "adapted", [1, 2], "a")
    add(scheduler, "base", [3, 4])
    assert step(scheduler)[0] == {}
    assert step(scheduler)[0] == {"base": (0, 2), "adapted": (0, 2)}


def test_running_sequences_go_on_while_prompts_are_held_back() -> None:
    scheduler = make_scheduler(clock=lambda: MAX_HELD_SECONDS / 2)
    add(scheduler, "running", [1, 2])
    step(scheduler)
    add(scheduler, "adapted", [1, 2], "a")
    add(scheduler, "base", [3, 4])
    assert step(scheduler)[0] == {"running": (2, 3)}
    assert step(scheduler)[0] == {"running": (3, 4), "base": (0, 2), "adapted": (0, 2)}


def test_prompts_are_held_back_for_a_moment_only() -> None:
    now = 0.0
    scheduler = make_scheduler(clock=lambda: now)
    add(scheduler, "adapted", [1, 2], "a")
    add(scheduler, "base", [3, 4])
    assert not scheduler.schedule()
    now = MAX_HELD_SECONDS
    assert spans(scheduler.schedule()) == {"base": (0, 2)}


def test_prompts_that_fill_a_step_are_not_held_back() -> None:
    scheduler = make_scheduler(clock=lambda: 0.0, max_num_batched_tokens=4)
    add(scheduler, "adapted", [1, 2], "a")
    add(scheduler, "base", [1, 2, 3, 4])
    assert step(scheduler)[0] == {"base": (0, 4)}


def test_overtaking_ends_before_a_waiting_adapter_starves() -> None:
    scheduler = make_scheduler(slots=1, max_num_seqs=2, max_model_len=500, num_blocks=500)
    add(scheduler, "holder", [1], "a", max_tokens=400)
    step(scheduler)
    step(scheduler)
    starving = add(scheduler, "starving", [1], "b")
    for number in range(MAX_TIMES_PASSED + 20):
        add(scheduler, f"base-{number}", [2], max_tokens=1)
    for _ in range(MAX_TIMES_PASSED + 20):
        step(scheduler)
    assert starving.times_passed == MAX_TIMES_PASSED
    assert len(scheduler.waiting) == 21, "nobody passes any more"


def test_an_unusable_adapter_ends_its_request_with_the_reason() -> None:
    scheduler = make_scheduler()
    add(scheduler, "bad", [1], "broken")
    _, outputs = step(scheduler)
    assert [(o.finish_reason, o.error) for o in outputs] == [("error", "Adapter broken@1 could not be loaded.")]
    assert not scheduler.has_work


@pytest.mark.parametrize("length", [0, 65])
def test_a_prompt_that_can_never_fit_ends_at_once(length: int) -> None:
    scheduler = make_scheduler()
    add(scheduler, "odd", [1] * length)
    _, outputs = step(scheduler)
    assert outputs[0].finish_reason == "error"
    assert not scheduler.has_work


def test_the_latest_sequence_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=4)
    early = add(scheduler, "early", [1] * 7, max_tokens=9)
    late = add(scheduler, "late", [2] * 7, max_tokens=9)
    waiting = add(scheduler, "waiting", [3] * 7)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert scheduler.running == [early]
    assert list(scheduler.waiting) == [late, waiting]
    assert late.num_computed_tokens == 0
    assert late.num_output_tokens > 0, "what it said is kept"


def test_a_stop_token_ends_the_text_of_who_asked_for_it() -> None:
    scheduler = make_scheduler()
    for name, sampling in (
        ("goes on", SamplingParams(max_tokens=3)),
        ("stops", SamplingParams(max_tokens=3, stop_token_ids=(9, EOS))),
    ):
        message = Submit(request_id=name, prompt_token_ids=(1,), sampling=sampling)
        scheduler.add(Sequence.from_submit(message, 0.0))
    _, outputs = step(scheduler, token=EOS)
    assert {o.request_id: (o.finish_reason, o.stop_token_id) for o in outputs} == {
        "goes on": (None, None),
        "stops": ("stop", EOS),
    }


def test_an_answer_ends_at_max_tokens_or_at_the_context() -> None:
    scheduler = make_scheduler(max_model_len=10)
    add(scheduler, "few", [1], max_tokens=2)
    add(scheduler, "many", [1] * 8, max_tokens=100)
    ends = [o for _ in range(2) for o in step(scheduler)[1] if o.finish_reason]
    assert [(o.request_id, o.finish_reason) for o in ends] == [("few", "length"), ("many", "length")]
    assert scheduler.block_pool.num_used == 0


def test_no_token_wanted_still_ends_after_the_prompt() -> None:
    scheduler = make_scheduler()
    add(scheduler, "none", [1, 2, 3], max_tokens=0)
    batch = scheduler.schedule()
    outputs = scheduler.update(batch, [Sampled(None)])
    assert [(o.token_ids, o.finish_reason) for o in outputs] == [((), "length")]


@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_aborted_sequence_leaves_nothing_behind(steps_before: int) -> None:
    scheduler = make_scheduler()
    add(scheduler, "gone", [1, 2, 3])
    for _ in range(steps_before):
        step(scheduler)
    scheduler.abort("gone")
    scheduler.abort("never-was")
    scheduler.check()
    assert not scheduler.has_work
    assert scheduler.block_pool.num_used == 0


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=20), st.sampled_from([None, "a", "b", "c"])),
        min_size=1,
        max_size=10,
    ),
    num_blocks=st.integers(8, 20),
    budget=st.integers(1, 40),
)
def test_every_text_is_the_same_whatever_the_memory_and_the_budget(
    prompts: list[tuple[list[int], str | None]], num_blocks: int, budget: int
) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks, max_num_batched_tokens=budget, max_model_len=32)
    for number, (prompt, adapter) in enumerate(prompts):
        add(scheduler, str(number), prompt, adapter, max_tokens=8)
    texts: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    for _ in range(2000):
        if not scheduler.has_work:
            break
        for output in step(scheduler)[1]:
            texts[output.request_id] += output.token_ids
    assert not scheduler.has_work, f"stuck: {scheduler!r}"
    for number, (prompt, _) in enumerate(prompts):
        known = list(prompt)
        for _ in range(8):
            known.append(1 + sum(known) % 97)
        assert texts[str(number)] == known[len(prompt) :]
    assert scheduler.block_pool.num_used == 0
