"""The engine: one decoder, its memory, and the step loop's body. Runs in any process; knows no socket and no HTTP."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import assert_never

from onebase_server.engine.adapter_pool import AdapterPool
from onebase_server.engine.block_pool import BlockPool
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.memory import MemoryMeter
from onebase_server.engine.prefix_pool import PrefixPool
from onebase_server.engine.prefix_writer import PrefixWriter
from onebase_server.engine.request import (
    Abort,
    AdapterRef,
    Attach,
    Attached,
    EngineStats,
    Retire,
    SamplingParams,
    StepOutputs,
    Submit,
    ToEngine,
)
from onebase_server.engine.resident_adapters import ResidentAdapters
from onebase_server.engine.runner import Runner
from onebase_server.engine.scheduler import AdapterLoading, AdapterMemoryFull, AdapterUnusable, Scheduler
from onebase_server.engine.sequence import Sequence
from onebase_server.errors import ConfigurationError
from onebase_server.model.decoder import Decoder
from onebase_server.model.kv_cache import allocate_kv_cache, kv_bytes_per_block
from onebase_server.settings import EngineSettings


@dataclass(slots=True)
class PendingAttach:
    """An adapter that is to be resident ahead of its first request."""

    adapter: AdapterRef
    since: float = field(default_factory=time.perf_counter)


class Engine:
    """Requests in, tokens out: `handle` messages, then `step`, again and again."""

    def __init__(
        self,
        decoder: Decoder,
        settings: EngineSettings,
        *,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_loaded` is called, on another thread, when an adapter's blob has been read."""
        num_blocks = settings.kv_cache_memory // kv_bytes_per_block(decoder.config, settings.block_size, decoder.dtype)
        if num_blocks == 0:
            raise ConfigurationError("The KV cache memory does not hold a single block; raise --kv-cache-memory.")
        self.decoder = decoder
        self.block_pool = BlockPool(num_blocks, settings.block_size)
        self.adapter_pool = AdapterPool(
            decoder.config,
            tuple(decoder.weights.groups),
            decoder.norms,
            settings.adapter_memory,
            MatrixFormat(decoder.dtype, is_int8=settings.adapter_quantization == "int8"),
            decoder.device,
            on_loaded=on_loaded,
        )
        self.max_model_len = min(decoder.max_model_len, num_blocks * settings.block_size)
        kv_cache = allocate_kv_cache(decoder.config, num_blocks, settings.block_size, decoder.dtype, decoder.device)
        self.runner = Runner(
            decoder,
            kv_cache,
            self.adapter_pool,
            max_num_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=self.max_model_len,
        )
        prefix_writer = PrefixWriter(decoder, kv_cache, settings.max_num_batched_tokens)
        self.prefix_pool = PrefixPool(self.block_pool, prefix_writer, self.max_model_len, on_loaded=on_loaded)
        self.adapters = ResidentAdapters(self.adapter_pool, self.prefix_pool)
        self.scheduler = Scheduler(
            self.block_pool,
            self.adapters,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_cache=settings.prefix_cache,
        )
        self._memory = MemoryMeter(decoder, self.block_pool, self.adapter_pool, self.runner)
        self._attaching: dict[str, PendingAttach] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step could achieve anything, now or once a blob has been read."""
        return self.scheduler.has_work or bool(self._attaching)

    def handle(self, message: ToEngine) -> None:
        """Take in what the API says; never computes."""
        match message:
            case Submit():
                self.scheduler.add(Sequence.from_submit(message, time.monotonic()))
            case Abort():
                self.scheduler.abort(message.request_id)
            case Attach():
                self.adapters.revive(message.adapter.digest)
                self._attaching[message.adapter.digest] = PendingAttach(message.adapter)
            case Retire():
                self.adapters.retire(message.digest)
            case _:
                assert_never(message)

    def warm_up(self) -> None:
        """Run one short request, so that the first client does not wait for threads, caches and lazy set-up."""
        self.handle(Submit(request_id="warm-up", prompt_token_ids=(0, 0), sampling=SamplingParams(max_tokens=2)))
        while self.has_work:
            self.step()

    def step(self) -> StepOutputs:
        """One step: schedule, execute, update."""
        started = time.perf_counter()
        batch = self.scheduler.schedule()
        size = (batch.num_tokens, len(batch.scheduled), batch.num_adapters)
        outputs = self.scheduler.update(batch, self.runner.execute(batch))
        return StepOutputs(outputs=tuple(outputs), stats=self.stats(size, time.perf_counter() - started))

    def poll_attaches(self) -> list[Attached]:
        """Attach what has been read since, between two steps; the answers to those that are settled."""
        settled = [answer for pending in list(self._attaching.values()) if (answer := self._try_attach(pending))]
        for answer in settled:
            del self._attaching[answer.digest]
        return settled

    def _try_attach(self, pending: PendingAttach) -> Attached | None:
        digest = pending.adapter.digest
        error = None
        try:
            self.adapters.acquire(pending.adapter)
            self.adapters.release(pending.adapter)
        except AdapterLoading:
            return None
        except AdapterMemoryFull:  # it will be attached by its first request, when there is room
            self.adapters.withdraw(pending.adapter)
        except AdapterUnusable as unusable:
            error = str(unusable)
        return Attached(digest=digest, seconds=time.perf_counter() - pending.since, error=error)

    def stats(self, batch: tuple[int, int, int] = (0, 0, 0), seconds: float = 0.0) -> EngineStats:
        """The state now, after a step of `batch` (tokens, requests, adapters) that took `seconds`, or after none."""
        scheduler, adapters = self.scheduler, self.adapter_pool
        batch_tokens, batch_requests, distinct_adapters = batch
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            batch_tokens=batch_tokens,
            batch_requests=batch_requests,
            distinct_adapters=distinct_adapters,
            kv_blocks_used=self.block_pool.num_used,
            kv_blocks_total=self.block_pool.num_blocks,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            adapter_bytes_used=adapters.bytes_used,
            adapter_bytes_total=adapters.bytes_total,
            adapters_resident=adapters.num_resident + self.prefix_pool.num_in_use,
            adapter_attaches=adapters.num_attaches + self.prefix_pool.num_attaches,
            adapter_evictions=adapters.num_evictions,
            preemptions=scheduler.num_preemptions,
            step_seconds=seconds,
            running_adapters=_labels(scheduler.running),
            waiting_adapters=_labels(scheduler.waiting),
            memory=self._memory.measure(),
        )

    def check(self) -> None:
        """Raise AssertionError unless all resource managers agree with each other."""
        self.scheduler.check()
        self.adapter_pool.check()


def _labels(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """The adapters of these sequences, each once, sorted."""
    refs = {sequence.adapter.digest: sequence.adapter for sequence in sequences if sequence.adapter}
    return tuple(sorted({part.label for ref in refs.values() for part in ref.parts}))
