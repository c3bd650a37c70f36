"""Which tokens of which sequences the next step computes.

Continuous batching with chunked prefill (Sarathi-Serve, arXiv 2403.02310) over paged KV blocks (vLLM, arXiv
2309.06180), preemption by recomputation, and admission that waits for adapters. It knows no torch: blocks are numbers,
adapters answer through `Adapters`.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from onebase_server.engine.block_pool import BlockPool, hash_block, hash_root
from onebase_server.engine.request import AdapterRef, Logprob, TokenOutput
from onebase_server.engine.sequence import NO_SLOT, Sequence

MAX_TIMES_PASSED = 64
"""How many later sequences may overtake one that waits for adapter memory: large adapters would starve otherwise."""


class AdapterBusy(Exception):
    """The adapter cannot run yet."""


class AdapterLoading(AdapterBusy):
    """Its bytes are on their way."""


class AdapterMemoryFull(AdapterBusy):
    """Running sequences' adapters fill the memory."""


class AdapterUnusable(Exception):
    """The adapter can never run here; the text says why."""


class Adapters(Protocol):
    """What the scheduler asks of adapter memory."""

    def acquire(self, adapter: AdapterRef) -> int:
        """Pin the adapter and return its slot; raises AdapterLoading, AdapterMemoryFull or AdapterUnusable."""

    def release(self, digest: str) -> None:
        """Undo one `acquire`."""

    def withdraw(self, digest: str) -> None:
        """A sequence that could not acquire the adapter yet is gone."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's part in one step: tokens `start … start + num_tokens - 1` of it."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def stop(self) -> int:
        """One past the last token computed."""
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether this step computes the last known token, so that the next one can be chosen."""
        return self.stop == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work, ordered by adapter slot (base rows first), so that each adapter's tokens are one run."""

    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(entry.num_tokens for entry in self.scheduled)

    @property
    def num_adapters(self) -> int:
        """Different adapters in the step."""
        return len({entry.sequence.slot for entry in self.scheduled} - {NO_SLOT})

    def __bool__(self) -> bool:
        return bool(self.scheduled)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the runner brings back for one sequence of a batch."""

    token_id: int | None
    """None while the prompt is not through, or when no token was wanted."""
    logprob: Logprob | None = None
    prompt_logprobs: tuple[Logprob, ...] = ()
    """For the prompt tokens that this chunk's positions predict."""


class Scheduler:
    """Waiting and running sequences, and the three moves between them: admit, preempt, finish."""

    def __init__(
        self,
        block_pool: BlockPool,
        adapters: Adapters,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_pool = block_pool
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.clock = clock
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._failed: list[TokenOutput] = []
        self._prompt_logprobs: dict[Sequence, list[Logprob | None]] = {}

    def __repr__(self) -> str:
        return f"Scheduler(running={len(self.running)}, waiting={len(self.waiting)}, {self.block_pool!r})"

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running, or an end is still to be told."""
        return bool(self.waiting or self.running or self._failed)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that can never fit ends at once with an error."""
        capacity = min(self.max_model_len, self.block_pool.num_blocks * self.block_pool.block_size)
        if not 0 < sequence.num_prompt_tokens <= capacity:
            self._fail(sequence, f"The prompt has {sequence.num_prompt_tokens} tokens; 1 to {capacity} fit.")
            return
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a sequence wherever it is; unknown ids (already finished) are ignored."""
        for sequence in self.waiting:
            if sequence.request_id == request_id:
                self.waiting.remove(sequence)
                if sequence.adapter:
                    self.adapters.withdraw(sequence.adapter.digest)
                return
        for sequence in self.running:
            if sequence.request_id == request_id:
                self._take_out(sequence)
                return

    def schedule(self) -> Batch:
        """Choose the next step: running sequences first, then as many waiting ones as budget and memory allow."""
        budget = self.max_num_batched_tokens
        scheduled: dict[Sequence, ScheduledSequence] = {}
        preemptions_before = self.num_preemptions

        for sequence in list(self.running):
            if sequence not in self.running:  # preempted for the sake of an earlier one
                continue
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if num_tokens == 0:
                break
            if not self._make_room(sequence, sequence.num_computed_tokens + num_tokens, scheduled):
                continue
            scheduled[sequence] = ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens)
            budget -= num_tokens

        if self.num_preemptions == preemptions_before:
            scheduled.update((entry.sequence, entry) for entry in self._admit(budget))

        return Batch(tuple(sorted(scheduled.values(), key=lambda entry: entry.sequence.slot)))

    def update(self, batch: Batch, sampled: list[Sampled]) -> list[TokenOutput]:
        """Take the step's tokens in; returns what each request gained, and the ends of those that failed meanwhile."""
        outputs = [self._advance(entry, result) for entry, result in zip(batch.scheduled, sampled, strict=True)]
        failed, self._failed = self._failed, []
        return failed + [output for output in outputs if output is not None]

    # Admission.

    def _admit(self, budget: int) -> list[ScheduledSequence]:
        """Move waiting sequences to running, in order, overtaking only those whose adapter is not ready."""
        admitted: list[ScheduledSequence] = []
        passed: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            shared = self._shareable_blocks(sequence)
            if self._missing_blocks(sequence, shared) > self.block_pool.num_free_without(shared):
                self.waiting.appendleft(sequence)
                break
            try:
                sequence.slot = self.adapters.acquire(sequence.adapter) if sequence.adapter else NO_SLOT
            except AdapterLoading:
                passed.append(sequence)
                continue
            except AdapterMemoryFull:
                passed.append(sequence)
                if sequence.times_passed >= MAX_TIMES_PASSED:
                    break
                continue
            except AdapterUnusable as error:
                self._fail(sequence, str(error))
                continue
            self._take_blocks(sequence, shared, budget)
            for earlier in passed:
                earlier.times_passed += 1
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            admitted.append(ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens))
            self.running.append(sequence)
            budget -= num_tokens
        self.waiting.extendleft(reversed(passed))
        return admitted

    def _shareable_blocks(self, sequence: Sequence) -> list[int]:
        """What the prefix cache has of a sequence; nothing where every position needs logits."""
        return [] if sequence.wants_prompt_logprobs else self.block_pool.match(self._reusable_hashes(sequence))

    def _missing_blocks(self, sequence: Sequence, shared: list[int]) -> int:
        """How many blocks the whole of what is known needs besides the shared ones."""
        return self.block_pool.blocks_for(sequence.num_tokens) - len(shared)

    def _take_blocks(self, sequence: Sequence, shared: list[int], budget: int) -> None:
        """Share what the prefix cache has and allocate the first chunk; there is room for the whole."""
        pool = self.block_pool
        num_cached = len(shared) * pool.block_size
        pool.share(shared)
        chunk_end = min(sequence.num_tokens, num_cached + budget)
        fresh = pool.allocate(pool.blocks_for(chunk_end) - len(shared))
        assert fresh is not None, "the check above counted these blocks"
        sequence.block_table = shared + fresh
        sequence.num_computed_tokens = num_cached
        sequence.num_remembered_blocks = len(shared)
        self.prefix_cache_queries += sequence.num_tokens
        self.prefix_cache_hits += num_cached
        if sequence.first_scheduled is None:
            sequence.first_scheduled = self.clock()
            sequence.num_cached_tokens = num_cached

    def _reusable_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the full blocks before the last known token, which must be computed to predict the next."""
        if not self.block_pool.prefix_cache:
            return []
        return self._hashes(sequence, (sequence.num_tokens - 1) // self.block_pool.block_size)

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """The first `count` block hashes, computing those that are new."""
        hashes, size = sequence.block_hashes, self.block_pool.block_size
        while len(hashes) < count:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else hash_root(sequence.adapter_digest)
            hashes.append(hash_block(parent, sequence.token_ids[start : start + size]))
        return hashes[:count]

    # Memory of running sequences.

    def _make_room(self, sequence: Sequence, num_tokens: int, scheduled: dict[Sequence, ScheduledSequence]) -> bool:
        """Give a running sequence blocks for `num_tokens`, preempting the latest ones; False if it had to go itself."""
        missing = self.block_pool.blocks_for(num_tokens) - len(sequence.block_table)
        while (blocks := self.block_pool.allocate(max(missing, 0))) is None:
            victim = self.running[-1]
            self._preempt(victim)
            scheduled.pop(victim, None)
            if victim is sequence:
                return False
        sequence.block_table += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue; its tokens stay, their keys and values are computed again."""
        self._take_out(sequence)
        sequence.num_computed_tokens = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    # Progress and ends.

    def _advance(self, entry: ScheduledSequence, result: Sampled) -> TokenOutput | None:
        """One sequence's step is done: note its progress, take its token, end it if that was the last."""
        sequence = entry.sequence
        sequence.num_computed_tokens = entry.stop
        self._remember_blocks(sequence)
        if sequence.wants_prompt_logprobs:
            self._prompt_logprobs.setdefault(sequence, [None]).extend(result.prompt_logprobs)
        if not entry.samples:
            return None
        is_first = sequence.num_output_tokens == 0
        if result.token_id is not None:
            sequence.token_ids.append(result.token_id)
        finish_reason = self._finish_reason(sequence, result.token_id)
        prompt_logprobs = self._prompt_logprobs.pop(sequence, None)
        if finish_reason:
            self._take_out(sequence)
        return TokenOutput(
            request_id=sequence.request_id,
            token_ids=() if result.token_id is None else (result.token_id,),
            logprobs=None if result.logprob is None else (result.logprob,),
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
            finish_reason=finish_reason,
            stop_token_id=result.token_id if finish_reason == "stop" else None,
            num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
            queue_seconds=(sequence.first_scheduled or sequence.arrival) - sequence.arrival if is_first else None,
        )

    def _remember_blocks(self, sequence: Sequence) -> None:
        """Offer the blocks that this step filled to the prefix cache."""
        full = sequence.num_computed_tokens // self.block_pool.block_size
        if full == sequence.num_remembered_blocks or not self.block_pool.prefix_cache:
            return
        hashes = self._hashes(sequence, full)
        for index in range(sequence.num_remembered_blocks, full):
            self.block_pool.remember(sequence.block_table[index], hashes[index])
        sequence.num_remembered_blocks = full

    def _finish_reason(self, sequence: Sequence, token_id: int | None) -> str | None:
        if token_id in sequence.sampling.stop_token_ids:
            return "stop"
        if sequence.num_output_tokens >= sequence.sampling.max_tokens or sequence.num_tokens >= self.max_model_len:
            return "length"
        return None

    def _fail(self, sequence: Sequence, error: str) -> None:
        """End a sequence that is in no list; told with the next update."""
        self._failed.append(TokenOutput(request_id=sequence.request_id, finish_reason="error", error=error))

    def _take_out(self, sequence: Sequence) -> None:
        """Take a running sequence out: blocks and adapter go back."""
        self.running.remove(sequence)
        self.block_pool.release(sequence.block_table)
        sequence.block_table = []
        self._release_adapter(sequence)
        self._prompt_logprobs.pop(sequence, None)

    def _release_adapter(self, sequence: Sequence) -> None:
        if sequence.adapter and sequence.slot != NO_SLOT:
            self.adapters.release(sequence.adapter.digest)
        sequence.slot = NO_SLOT

    def check(self) -> None:
        """Raise AssertionError unless sequences and blocks agree."""
        self.block_pool.check()
        held = {block for sequence in self.running for block in sequence.block_table}
        assert len(held) == self.block_pool.num_used, f"{self!r}: sequences hold {len(held)} blocks"
        assert not any(sequence.block_table for sequence in self.waiting), "a waiting sequence holds blocks"
