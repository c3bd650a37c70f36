"""Scheduler and pools around a KV cache that remembers what was written where, so that a wrong read shows."""

import queue
from collections.abc import Hashable

from onebase_server.engine.block_pool import BlockPool
from onebase_server.engine.prefix_pool import PrefixPool
from onebase_server.engine.request import AdapterRef, SamplingParams, Submit, TokenOutput
from onebase_server.engine.resident_adapters import ResidentAdapters
from onebase_server.engine.scheduler import AdapterLoading, Sampled, Scheduler
from onebase_server.engine.sequence import Sequence

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


class Arena:
    """Low-rank adapters that are always there."""

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}

    def is_ready(self, adapter: AdapterRef) -> bool:
        return True

    def acquire(self, adapter: AdapterRef) -> int:
        return self.slots.setdefault(adapter.digest, len(self.slots))

    def release(self, digest: str) -> None:
        """Nothing is counted."""

    def withdraw(self, digest: str) -> None:
        """Nothing is ever waited for."""


class Machine:
    """Pools and scheduler around a memory of a few blocks."""

    def __init__(self, num_blocks: int = 16, *, budget: int = 32, prefix_cache: bool = True) -> None:
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.memory = Memory(num_blocks)
        self.blocks = BlockPool(num_blocks, BLOCK)
        max_model_len = min(MAX_MODEL_LEN, num_blocks * BLOCK)
        self.prefixes = PrefixPool(self.blocks, self.memory, max_model_len, on_loaded=lambda: self.bell.put(None))
        self.scheduler = Scheduler(
            self.blocks,
            ResidentAdapters(Arena(), self.prefixes),
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
    """What keys and values at a position depend on: all tokens up to there, and where an adapter became active."""
    if position < sequence.num_virtual_tokens:
        return (sequence.adapter_digest, position)
    is_active = sequence.adapter is not None and position >= sequence.first_adapted
    activation = (sequence.adapter_digest, sequence.first_adapted) if is_active else None
    return (activation, *sequence.tokens_at(0, position + 1))


def next_token(sequence: Sequence) -> int:
    """What a deterministic model would say: it depends on the prefix and all tokens so far."""
    return 1 + (sequence.num_virtual_tokens + sum(sequence.token_ids)) % 97


def lora(name: str, *invocation_tokens: int) -> AdapterRef:
    return AdapterRef.of_version(digest=name, path="", label=f"{name}@1", invocation_tokens=invocation_tokens)


def prefix(name: str, num_tokens: int, path: str = "") -> AdapterRef:
    return AdapterRef.of_version(digest=name, path=path, label=f"{name}@1", num_virtual_tokens=num_tokens)
