"""Prefixes in the KV cache: written once, shared by all, never written over, and given away when nobody uses them."""

import queue
from collections.abc import Hashable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_server.engine.adapter_pool import AdapterPool
from onebase_server.engine.block_pool import BlockPool
from onebase_server.engine.prefix_pool import PrefixPool
from onebase_server.engine.request import AdapterRef, SamplingParams, Submit, TokenOutput
from onebase_server.engine.resident_adapters import ResidentAdapters
from onebase_server.engine.scheduler import AdapterLoading, AdapterMemoryFull, AdapterUnusable, Sampled, Scheduler
from onebase_server.engine.sequence import Sequence
from onebase_server.model.config import ModelConfig

from .conftest import TINY

BLOCK = 4
MAX_MODEL_LEN = 32


class Memory:
    """The KV cache as a list of what was written where; whatever reads it can tell whether that is its own."""

    def __init__(self, num_blocks: int) -> None:
        self.slots: list[Hashable] = [None] * (num_blocks * BLOCK)
        self.num_written: dict[str, int] = {}

    def read(self, adapter: AdapterRef) -> AdapterRef:
        if adapter.parts[0].path == "damaged":
            raise ValueError("Blob damaged is damaged.")
        return adapter

    def write(self, prefix: AdapterRef, blocks: list[int]) -> None:
        self.num_written[prefix.digest] = self.num_written.get(prefix.digest, 0) + 1
        for position in range(prefix.num_virtual_tokens):
            self.slots[slot_of(blocks, position)] = (prefix.digest, position)

    def copy(self, source: int, target: int) -> None:
        self.slots[target * BLOCK : (target + 1) * BLOCK] = self.slots[source * BLOCK : (source + 1) * BLOCK]


def slot_of(blocks: list[int], position: int) -> int:
    return blocks[position // BLOCK] * BLOCK + position % BLOCK


class Machine:
    """Pools and scheduler around a memory of a few blocks; there are no low-rank adapters."""

    def __init__(self, num_blocks: int = 16, *, budget: int = 32, prefix_cache: bool = True) -> None:
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.memory = Memory(num_blocks)
        self.blocks = BlockPool(num_blocks, BLOCK)
        max_model_len = min(MAX_MODEL_LEN, num_blocks * BLOCK)
        self.prefixes = PrefixPool(self.blocks, self.memory, max_model_len, on_loaded=lambda: self.bell.put(None))
        low_rank = AdapterPool(ModelConfig.from_hf(TINY), (), 0, torch.float32, torch.device("cpu"))
        self.scheduler = Scheduler(
            self.blocks,
            ResidentAdapters(low_rank, self.prefixes),
            max_num_seqs=8,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            prefix_cache=prefix_cache,
        )

    def acquire(self, adapter: AdapterRef) -> list[int]:
        """Acquire, waiting for the blob to be read if it is not there yet; its blocks."""
        while True:
            try:
                self.prefixes.acquire(adapter)
            except AdapterLoading:
                self.bell.get(timeout=10)
            else:
                return self.prefixes.blocks(adapter.digest)

    def attach(self, adapter: AdapterRef) -> AdapterRef:
        """Have a prefix written ahead of its first request."""
        self.acquire(adapter)
        self.prefixes.release(adapter.digest)
        return adapter

    def add(self, name: str, prompt: list[int], adapter: AdapterRef | None, max_tokens: int = 4) -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens, seed=1)
        message = Submit(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling, adapter=adapter)
        sequence = Sequence.from_submit(message, arrival=0.0)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> tuple[dict[str, tuple[int, int]], list[TokenOutput]]:
        """One step that computes something; what, as {name: (start, stop)}, and what came out.

        The tokens computed are written, and each sequence reads all of its past.
        """
        while not (batch := self.scheduler.schedule()) and self.prefixes.num_loading:
            self.bell.get(timeout=10)
        for entry in batch.scheduled:
            for position in range(entry.start, entry.stop):
                slot = slot_of(entry.sequence.block_table, position)
                self.memory.slots[slot] = history(entry.sequence, position)
        for entry in batch.scheduled:
            for position in range(entry.stop):
                kept = self.memory.slots[slot_of(entry.sequence.block_table, position)]
                assert kept == history(entry.sequence, position), f"{entry.sequence.request_id} reads another's past"
        sampled = [Sampled(next_token(e.sequence) if e.samples else None) for e in batch.scheduled]
        outputs = self.scheduler.update(batch, sampled)
        self.scheduler.check()
        return {entry.sequence.request_id: (entry.start, entry.stop) for entry in batch.scheduled}, outputs

    def run(self) -> dict[str, list[int]]:
        """Step until all is said; the texts."""
        texts: dict[str, list[int]] = {}
        for _ in range(2000):
            if not self.scheduler.has_work:
                return texts
            for output in self.step()[1]:
                assert output.error is None
                texts.setdefault(output.request_id, []).extend(output.token_ids)
        raise AssertionError(f"stuck: {self.scheduler!r}")


def history(sequence: Sequence, position: int) -> Hashable:
    """What keys and values at a position depend on: the adapter, and all tokens up to there."""
    if position < sequence.num_virtual_tokens:
        return (sequence.adapter_digest, position)
    return (sequence.adapter_digest, *sequence.tokens_at(0, position + 1))


def next_token(sequence: Sequence) -> int:
    """What a deterministic model would say: it depends on the prefix and all tokens so far."""
    return 1 + (sequence.num_virtual_tokens + sum(sequence.token_ids)) % 97


def prefix(name: str, num_tokens: int, path: str = "") -> AdapterRef:
    return AdapterRef.of_version(digest=name, path=path, label=f"{name}@1", num_virtual_tokens=num_tokens)


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.blocks.check()


def test_a_prefix_is_written_once_and_no_request_computes_it(machine: Machine) -> None:
    adapter = machine.attach(prefix("a", 6))
    first, second = (machine.add(name, [1, 2, 3], adapter) for name in ("first", "second"))
    assert machine.step()[0] == {"first": (6, 9), "second": (6, 9)}
    assert machine.memory.num_written == {"a": 1}
    assert first.block_table[0] == second.block_table[0], "the full block is shared"
    assert first.block_table[1] != second.block_table[1], "of the other each has a copy"


def test_virtual_tokens_are_no_part_of_what_is_reported(machine: Machine) -> None:
    adapter = machine.attach(prefix("a", 6))
    for name in ("first", "again"):
        machine.add(name, [1, 2, 3, 4, 5, 6, 7], adapter, max_tokens=1)
        _, outputs = machine.step()
        assert outputs[0].num_cached_tokens == (0 if name == "first" else 6)
    assert (machine.scheduler.prefix_cache_queries, machine.scheduler.prefix_cache_hits) == (14, 6)


def test_a_prefix_is_shared_where_the_prefix_cache_is_off() -> None:
    machine = Machine(prefix_cache=False)
    adapter = machine.attach(prefix("a", 8))
    for name in ("first", "again"):
        machine.add(name, [1, 2, 3], adapter, max_tokens=1)
        assert machine.step()[0] == {name: (8, 11)}
    assert machine.memory.num_written == {"a": 1}


def test_an_idle_prefix_stays_until_its_blocks_are_needed(machine: Machine) -> None:
    adapter = machine.attach(prefix("a", 6))
    machine.acquire(adapter)
    machine.prefixes.release("a")
    assert machine.memory.num_written == {"a": 1}
    machine.blocks.release(machine.blocks.allocate(machine.blocks.num_blocks) or [])
    machine.acquire(adapter)
    assert machine.memory.num_written == {"a": 2}


def test_only_what_was_given_away_of_a_prefix_is_allocated_again(machine: Machine) -> None:
    adapter = prefix("a", 12)
    before = machine.acquire(adapter)
    machine.prefixes.release("a")
    machine.blocks.allocate(machine.blocks.num_blocks - 2)  # the last block of a prefix leaves before its first ones
    with pytest.raises(AdapterMemoryFull):
        machine.acquire(adapter)
    machine.blocks.release([before[2]])
    assert machine.acquire(adapter)[:2] == before[:2]


def test_versions_of_a_prefix_share_nothing(machine: Machine) -> None:
    first, second = (machine.acquire(prefix(name, 8)) for name in ("version-1", "version-2"))
    assert not set(first) & set(second)


def test_a_prefix_beyond_the_context_is_unusable(machine: Machine) -> None:
    with pytest.raises(AdapterUnusable, match=r"long@1 cannot run here: its 32 virtual tokens leave no room .* of 32"):
        machine.acquire(prefix("long", MAX_MODEL_LEN))


def test_a_damaged_blob_harms_its_own_requests_only(machine: Machine) -> None:
    machine.add("bad", [1], prefix("bad", 4, path="damaged"))
    machine.add("good", [1], prefix("good", 4), max_tokens=1)
    ends = {output.request_id: output for _ in range(3) for output in machine.step()[1]}
    assert ends["bad"].error == "Adapter bad@1 cannot run here: Blob damaged is damaged."
    assert ends["good"].error is None
    assert machine.blocks.num_used == 0


def test_a_withdrawn_wish_keeps_no_bytes_waiting(machine: Machine) -> None:
    with pytest.raises(AdapterLoading):
        machine.prefixes.acquire(prefix("a", 4))
    assert machine.prefixes.num_loading == 1
    machine.prefixes.withdraw("a")
    assert machine.prefixes.num_loading == 0


ADAPTERS = (None, prefix("a", 1), prefix("b", 4), prefix("c", 6), prefix("d", 9))


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=12), st.sampled_from(ADAPTERS)),
        min_size=1,
        max_size=12,
    ),
    aborted=st.sets(st.integers(0, 11)),
    num_blocks=st.integers(9, 20),
    budget=st.integers(1, 40),
    prefix_cache=st.booleans(),
)
def test_every_request_reads_its_own_past_whatever_the_memory_and_no_block_is_lost(
    requests: list[tuple[list[int], AdapterRef | None]],
    aborted: set[int],
    num_blocks: int,
    budget: int,
    prefix_cache: bool,
) -> None:
    machine = Machine(num_blocks, budget=budget, prefix_cache=prefix_cache)
    for number, (prompt, adapter) in enumerate(requests):
        machine.add(str(number), prompt, adapter, max_tokens=8)
    for number in sorted(aborted):  # some wait, some run, some have ended, some never were
        machine.step()
        machine.scheduler.abort(str(number))
        machine.scheduler.check()
    machine.run()
    assert machine.blocks.num_used == 0
    assert machine.prefixes.num_in_use == 0
    assert machine.prefixes.num_loading == 0


def test_a_text_behind_a_prefix_is_the_same_after_preemption() -> None:
    texts = []
    for num_blocks in (64, 9):
        machine = Machine(num_blocks)
        for number in range(4):
            machine.add(str(number), [number] * 7, ADAPTERS[number], max_tokens=12)
        texts.append(machine.run())
    assert machine.scheduler.num_preemptions > 0
    assert texts[0] == texts[1]
