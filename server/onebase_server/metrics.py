"""Every Prometheus name of the server, in one place.

A leaf: it knows the engine's statistics as numbers, but neither HTTP nor the engine itself. Each `Metrics` has a
registry of its own, so that two servers in one process (or two tests) never share a counter.
"""

import time
from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from onebase_server.engine.request import EngineMemory, EngineStats
from onebase_server.process_memory import resident_bytes

Outcome = Literal["completed", "aborted", "refused", "unavailable", "failed"]
"""How a generation request ended; `aborted` is a client that went away, `refused` a 4xx, `unavailable` a 503."""

OTHER = "other"
"""The label shared by all adapters that have none of their own."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """What is measured, as counters, gauges and histograms ready to be updated."""

    def __init__(self, *, base_name: str, adapter_labels: int, max_adapters: int) -> None:
        self.registry = CollectorRegistry()
        self._max_adapters = max_adapters
        self._last = EngineStats()
        self._adapter_labels = AdapterLabels(adapter_labels)
        self._define_requests()
        self._define_adapters()
        self._define_engine()
        self._define_vllm(base_name)

    def _define_requests(self) -> None:
        registry = self.registry
        self.requests = Counter("onebase_requests", "Generation requests by outcome.", ["outcome"], registry=registry)
        for outcome in get_args(Outcome):
            self.requests.labels(outcome)  # zero from the start, so that the first of a kind shows as a rise
        self.finished_sequences = Counter(
            "onebase_finished_sequences", "Sequences by why they ended.", ["reason"], registry=registry
        )
        self.prompt_tokens = Counter("onebase_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("onebase_generated_tokens", "Tokens generated.", registry=registry)
        self.time_to_first_token = Histogram(
            "onebase_time_to_first_token_seconds",
            "From a request's arrival to a sequence's first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "onebase_inter_token_latency_seconds",
            "Between two tokens of a sequence.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_latency = Histogram(
            "onebase_request_latency_seconds",
            "From a request's arrival to its last byte.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_time = Histogram(
            "onebase_queue_seconds",
            "From a sequence's arrival in the engine to its first step.",
            buckets=_SECONDS,
            registry=registry,
        )

    def _define_adapters(self) -> None:
        registry = self.registry
        self._adapter_requests = Counter(
            "onebase_adapter_requests", "Requests for an adapter.", ["adapter"], registry=registry
        )
        self._adapter_prompt_tokens = Counter(
            "onebase_adapter_prompt_tokens", "Tokens of prompts for an adapter.", ["adapter"], registry=registry
        )
        self._adapter_generated_tokens = Counter(
            "onebase_adapter_generated_tokens", "Tokens generated with an adapter.", ["adapter"], registry=registry
        )
        self.published_adapters = Gauge("onebase_published_adapters", "Adapters that are published.", registry=registry)
        self.swap_duration = Histogram(
            "onebase_swap_seconds",
            "From reading a newly live adapter version to its use in device memory.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._adapter_bytes_used = Gauge(
            "onebase_adapter_memory_used_bytes", "Adapter memory in use.", registry=registry
        )
        self._adapter_bytes_total = Gauge(
            "onebase_adapter_memory_total_bytes", "The whole adapter memory.", registry=registry
        )
        self._adapters_resident = Gauge(
            "onebase_adapters_resident", "Adapter versions in device memory.", registry=registry
        )
        self._adapter_attaches = Counter(
            "onebase_adapter_attaches", "Adapter versions brought into device memory.", registry=registry
        )
        self._adapter_evictions = Counter(
            "onebase_adapter_evictions", "Idle adapter versions that left device memory for others.", registry=registry
        )

    def _define_engine(self) -> None:
        registry = self.registry
        self.engine_up = Gauge("onebase_engine_up", "1 while the engine can take requests.", registry=registry)
        self._memory = Gauge(
            "onebase_memory_bytes",
            "Memory of the server: the parts of the engine, and the API process. On a CPU their sum is resident.",
            ["part"],
            registry=registry,
        )
        self.engine_restarts = Counter(
            "onebase_engine_restarts", "How often the engine died and was started again.", registry=registry
        )
        self._batch_requests = Histogram(
            "onebase_batch_requests", "Requests in one step.", buckets=_COUNTS, registry=registry
        )
        self._batch_tokens = Histogram(
            "onebase_batch_tokens", "Tokens in one step.", buckets=_COUNTS, registry=registry
        )
        self._distinct_adapters = Histogram(
            "onebase_distinct_adapters", "Different adapters in one step.", buckets=(0, *_COUNTS), registry=registry
        )
        self._step_time = Histogram(
            "onebase_step_seconds", "Duration of one step.", buckets=_SECONDS, registry=registry
        )
        self._kv_blocks_used = Gauge("onebase_kv_blocks_used", "Blocks of the KV cache in use.", registry=registry)
        self._kv_blocks_total = Gauge("onebase_kv_blocks_total", "Blocks of the KV cache.", registry=registry)
        self._prefix_queries = Counter(
            "onebase_prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.", registry=registry
        )
        self._prefix_hits = Counter(
            "onebase_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", registry=registry
        )
        self._preemptions = Counter(
            "onebase_preemptions", "Running sequences put back for want of KV blocks.", registry=registry
        )

    def _define_vllm(self, base_name: str) -> None:
        """The names that routers and dashboards made for vLLM look for."""

        def gauge(name: str, text: str) -> Gauge:
            metric = Gauge(f"vllm:{name}", text, ["model_name"], registry=self.registry)
            return metric.labels(base_name)

        self._vllm_running = gauge("num_requests_running", "Requests in the running batch.")
        self._vllm_waiting = gauge("num_requests_waiting", "Requests that wait.")
        self._vllm_kv_usage = gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.")
        self._vllm_lora = Gauge(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests, at the time that is the value (Unix seconds).",
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            registry=self.registry,
        )

    def on_stats(self, stats: EngineStats) -> None:
        """Take in the engine's state after a step; its counters count from the engine's start."""
        last, self._last = self._last, stats
        for counter, now, before in (
            (self._adapter_attaches, stats.adapter_attaches, last.adapter_attaches),
            (self._adapter_evictions, stats.adapter_evictions, last.adapter_evictions),
            (self._prefix_queries, stats.prefix_cache_queries, last.prefix_cache_queries),
            (self._prefix_hits, stats.prefix_cache_hits, last.prefix_cache_hits),
            (self._preemptions, stats.preemptions, last.preemptions),
        ):
            if now > before:
                counter.inc(now - before)
        if stats.batch_requests:
            self._batch_requests.observe(stats.batch_requests)
            self._batch_tokens.observe(stats.batch_tokens)
            self._distinct_adapters.observe(stats.distinct_adapters)
            self._step_time.observe(stats.step_seconds)

    def on_restart(self) -> None:
        """The engine died: what it held is gone, and its counters start from zero again."""
        self.engine_restarts.inc()
        self._last = EngineStats()

    def count_request(self, adapters: Sequence[str], prompt_tokens: int, generated_tokens: int) -> None:
        """Count a request that has ended, for each of its adapters too: their names without a version."""
        self.prompt_tokens.inc(prompt_tokens)
        self.generated_tokens.inc(generated_tokens)
        for adapter in adapters:
            self._count_for(adapter, prompt_tokens, generated_tokens)

    def _count_for(self, adapter: str, prompt_tokens: int, generated_tokens: int) -> None:
        label, displaced = self._adapter_labels.count(adapter, 1 + prompt_tokens + generated_tokens)
        if displaced is not None:
            self._remove_series(displaced)
        self._adapter_requests.labels(label).inc()
        self._adapter_prompt_tokens.labels(label).inc(prompt_tokens)
        self._adapter_generated_tokens.labels(label).inc(generated_tokens)

    def forget_adapter(self, adapter: str) -> None:
        """Drop the series of an adapter that was removed."""
        if self._adapter_labels.forget(adapter):
            self._remove_series(adapter)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4, which every scraper reads.

        OpenMetrics is not offered: prometheus_client then writes `vllm:` as `vllm_` for a scraper such as Prometheus 2,
        and what looks for vLLM's names would find nothing.
        """
        self._set_gauges(self._last)
        return generate_latest(self.registry)

    def _set_gauges(self, stats: EngineStats) -> None:
        self._adapter_bytes_used.set(stats.adapter_bytes_used)
        self._adapter_bytes_total.set(stats.adapter_bytes_total)
        self._adapters_resident.set(stats.adapters_resident)
        for part, count in memory_parts(stats.memory).items():
            self._memory.labels(part).set(count)
        self._kv_blocks_used.set(stats.kv_blocks_used)
        self._kv_blocks_total.set(stats.kv_blocks_total)
        self._vllm_running.set(stats.running)
        self._vllm_waiting.set(stats.waiting)
        self._vllm_kv_usage.set(stats.kv_blocks_used / max(1, stats.kv_blocks_total))
        self._vllm_lora.clear()  # the sets of names are labels: only the present ones may be seen
        self._vllm_lora.labels(self._max_adapters, _names(stats.running_adapters), _names(stats.waiting_adapters)).set(
            time.time()
        )

    def _remove_series(self, adapter: str) -> None:
        for metric in (self._adapter_requests, self._adapter_prompt_tokens, self._adapter_generated_tokens):
            metric.remove_by_labels({"adapter": adapter})


class AdapterLabels:
    """Which adapters have series of their own: the `limit` with the most traffic so far.

    Counters may never fall, or `rate()` sees a restart. So an adapter that is displaced loses its series (its later
    traffic counts as `other`), and one that moves up starts a series at zero; nothing is carried between series.
    """

    LEAD = 1.25
    """How many times its traffic displaces the least labelled adapter; more than 1, so that two do not take turns."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._traffic: Tally[str] = Tally()
        self._labelled: set[str] = set()

    def count(self, adapter: str, amount: int) -> tuple[str, str | None]:
        """Add traffic; returns the label to count under, and the adapter that lost its own by this, if any."""
        self._traffic[adapter] += amount
        if adapter in self._labelled:
            return adapter, None
        if len(self._labelled) < self._limit:
            self._labelled.add(adapter)
            return adapter, None
        least = min(self._labelled, key=self._traffic.__getitem__, default=None)
        if least is None or self._traffic[adapter] < self.LEAD * self._traffic[least]:
            return OTHER, None
        self._labelled.remove(least)
        self._labelled.add(adapter)
        return adapter, least

    def forget(self, adapter: str) -> bool:
        """Drop an adapter; returns whether it had a label."""
        del self._traffic[adapter]
        had_label = adapter in self._labelled
        self._labelled.discard(adapter)
        return had_label


def memory_parts(engine: EngineMemory) -> dict[str, int]:
    """Bytes of all processes by part: the engine's, and what this one, the API's, has resident."""
    return {**msgspec.structs.asdict(engine), "api": resident_bytes()}


def _names(labels: Iterable[str]) -> str:
    """`("pirate@2", "pirate@1")` → `"pirate"`: names as vLLM writes them, separated by commas."""
    return ",".join(sorted({label.rpartition("@")[0] for label in labels}))
