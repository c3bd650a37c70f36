"""Which tokens of which sequences the next step computes.

Continuous batching with chunked prefill (Sarathi-Serve, arXiv 2403.02310) over paged KV blocks (vLLM, arXiv
2309.06180), preemption by recomputation, and admission that waits for adapters. It knows no torch: blocks are numbers,
adapters answer through `Adapters`.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from onebase_server.engine.block_pool import BlockPool, hash_activation, hash_block, hash_root
from onebase_server.engine.request import AdapterRef, Logprob, TokenOutput
from onebase_server.engine.sequence import NO_SLOT, Sequence

MAX_TIMES_PASSED = 64
"""How many later sequences may overtake one that waits for adapter memory: large adapters would starve otherwise."""


MAX_HELD_SECONDS = 0.01
"""How long a prompt that could start may wait for company: about what its own step saves by having some."""


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

    def is_ready(self, adapter: AdapterRef) -> bool:
        """Whether `acquire` need not wait for the adapter's bytes, which are on their way from now on."""

    def acquire(self, adapter: AdapterRef) -> int:
        """Pin the adapter and return its slot; NO_SLOT for a prefix, behind which rows are the base's.

        Raises AdapterLoading, AdapterMemoryFull or AdapterUnusable.
        """

    def release(self, adapter: AdapterRef) -> None:
        """Undo one `acquire`."""

    def withdraw(self, adapter: AdapterRef) -> None:
        """A sequence that could not acquire the adapter yet is gone."""

    def prefix_blocks(self, adapter: AdapterRef) -> list[int]:
        """The blocks that hold a pinned adapter's virtual tokens, in order; none if it has none."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy keys and values: of the last block of a prefix, which it does not fill, to a sequence's own block."""


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
        return len({entry.sequence.adapter_digest for entry in self.scheduled} - {None})

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
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_pool = block_pool
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.prefix_cache = prefix_cache
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
        capacity = self._capacity(sequence) - sequence.num_virtual_tokens
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
                    self.adapters.withdraw(sequence.adapter)
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

        if self.num_preemptions == preemptions_before and not self._is_held_back(budget):
            scheduled.update((entry.sequence, entry) for entry in self._admit(budget))

        return Batch(tuple(sorted(scheduled.values(), key=lambda entry: entry.sequence.slot)))

    def update(self, batch: Batch, sampled: list[Sampled]) -> list[TokenOutput]:
        """Take the step's tokens in; returns what each request gained, and the ends of those that failed meanwhile."""
        outputs = [self._advance(entry, result) for entry, result in zip(batch.scheduled, sampled, strict=True)]
        failed, self._failed = self._failed, []
        return failed + [output for output in outputs if output is not None]

    def _capacity(self, sequence: Sequence) -> int:
        """The most positions that a sequence can ever have."""
        blocks = self.block_pool.num_blocks - self._num_prefix_ends(sequence)
        return min(self.max_model_len, blocks * self.block_pool.block_size)

    # Admission.

    def _is_held_back(self, budget: int) -> bool:
        """Whether prompts that could start wait for others whose adapters are being read.

        A step costs much however few prompts it has (weights are decoded once for all of them), so those that came
        together are best computed together: where that fills no step anyway, and for MAX_HELD_SECONDS at most.
        """
        candidates = list(islice(self.waiting, self.max_num_seqs - len(self.running)))
        ready = [s for s in candidates if s.adapter is None or self.adapters.is_ready(s.adapter)]
        if not ready or len(ready) == len(candidates) or sum(s.num_tokens for s in ready) >= budget:
            return False
        return self.clock() < min(s.arrival for s in ready) + MAX_HELD_SECONDS

    def _admit(self, budget: int) -> list[ScheduledSequence]:
        """Move waiting sequences to running, in order, overtaking only those whose adapter is not ready."""
        admitted: list[ScheduledSequence] = []
        passed: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            if not self._has_room(sequence):
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
            self._take_blocks(sequence, budget)
            for earlier in passed:
                earlier.times_passed += 1
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            admitted.append(ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens))
            self.running.append(sequence)
            budget -= num_tokens
        self.waiting.extendleft(reversed(passed))
        return admitted

    def _shareable_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks that a sequence need not compute: those that its prefix fills, and what the prefix cache has.

        The last known token is never among them, for it must be computed to predict the next; where every position
        needs logits, no token is.
        """
        reuses_tokens = self.prefix_cache and not sequence.wants_prompt_logprobs
        num_reusable = sequence.num_tokens - 1 if reuses_tokens else sequence.num_virtual_tokens
        return self.block_pool.match(self._hashes(sequence, num_reusable // self.block_pool.block_size))

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there are blocks for the whole of what is known, and for its prefix if that is not there yet."""
        shared = self._shareable_blocks(sequence)
        needed = self.block_pool.blocks_for(sequence.num_tokens) + self._num_prefix_ends(sequence)
        return needed - len(shared) <= self.block_pool.num_free_without(shared)

    def _num_prefix_ends(self, sequence: Sequence) -> int:
        """1 where the prefix's last block is not full: sequences have copies of it, so it is needed once more."""
        return int(sequence.num_virtual_tokens % self.block_pool.block_size > 0)

    def _take_blocks(self, sequence: Sequence, budget: int) -> None:
        """Share what need not be computed and allocate the first chunk; there is room for the whole."""
        pool = self.block_pool
        prefix = self._prefix_blocks(sequence)
        num_filled = sequence.num_virtual_tokens // pool.block_size
        shared = prefix[:num_filled] + self._shareable_blocks(sequence)[num_filled:]
        num_cached = max(len(shared) * pool.block_size, sequence.num_virtual_tokens)
        pool.share(shared)
        chunk_end = min(sequence.num_tokens, num_cached + budget)
        fresh = pool.allocate(pool.blocks_for(chunk_end) - len(shared))
        assert fresh is not None, "`_has_room` counted these blocks"
        if num_cached > len(shared) * pool.block_size:
            self.adapters.copy_block(prefix[-1], fresh[0])
        sequence.block_table = shared + fresh
        sequence.num_computed_tokens = num_cached
        sequence.num_remembered_blocks = len(shared)
        self.prefix_cache_queries += len(sequence.token_ids)
        self.prefix_cache_hits += num_cached - sequence.num_virtual_tokens
        if sequence.first_scheduled is None:
            sequence.first_scheduled = self.clock()
            sequence.num_cached_tokens = num_cached - sequence.num_virtual_tokens

    def _prefix_blocks(self, sequence: Sequence) -> list[int]:
        return self.adapters.prefix_blocks(sequence.adapter) if sequence.adapter else []

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """The first `count` block hashes, computing those that are new."""
        hashes, size = sequence.block_hashes, self.block_pool.block_size
        while len(hashes) < count:
            start, first = len(hashes) * size, sequence.first_adapted
            parent = hashes[-1] if hashes else hash_root(None if first else sequence.adapter_digest)
            if sequence.adapter and first and start <= first < start + size:
                parent = hash_activation(parent, sequence.adapter.digest, first)
            hashes.append(hash_block(parent, sequence.tokens_at(start, start + size)))
        return hashes[:count]

    # Memory of running sequences.

    def _make_room(self, sequence: Sequence, num_tokens: int, scheduled: dict[Sequence, ScheduledSequence]) -> bool:
        """Give a running sequence blocks for `num_tokens`, preempting the latest ones; False if it had to go itself."""
        missing = self.block_pool.blocks_for(num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        while (blocks := self.block_pool.allocate(missing)) is None:
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
        if full == sequence.num_remembered_blocks or not self.prefix_cache:
            return
        hashes = self._hashes(sequence, full)
        for index in range(sequence.num_remembered_blocks, full):
            self.block_pool.remember(sequence.block_table[index], hashes[index])
        sequence.num_remembered_blocks = full

    def _finish_reason(self, sequence: Sequence, token_id: int | None) -> str | None:
        if token_id in sequence.sampling.stop_token_ids:
            return "stop"
        is_full = sequence.num_tokens >= self._capacity(sequence)
        return "length" if is_full or sequence.num_output_tokens >= sequence.sampling.max_tokens else None

    def _fail(self, sequence: Sequence, error: str) -> None:
        """End a sequence that is in no list; told with the next update."""
        self._failed.append(TokenOutput(request_id=sequence.request_id, finish_reason="error", error=error))

    def _take_out(self, sequence: Sequence) -> None:
        """Take a running sequence out: blocks and adapter go back."""
        self.running.remove(sequence)
        self.block_pool.release(sequence.block_table)
        sequence.block_table = []
        if sequence.adapter:
            self.adapters.release(sequence.adapter)
        sequence.slot = NO_SLOT
        self._prompt_logprobs.pop(sequence, None)

    def check(self) -> None:
        """Raise AssertionError unless sequences and blocks agree."""
        self.block_pool.check()
        held = {block for s in self.running for block in (*s.block_table, *self._prefix_blocks(s))}
        assert len(held) == self.block_pool.num_used, f"{self!r}: sequences and prefixes hold {len(held)} blocks"
        assert not any(sequence.block_table for sequence in self.waiting), "a waiting sequence holds blocks"
