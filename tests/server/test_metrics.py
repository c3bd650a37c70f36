import pytest

from onebase_server.engine.request import EngineMemory, EngineStats
from onebase_server.metrics import OTHER, AdapterLabels, Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(base_name="base", adapter_labels=2, max_adapters=16)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    metrics.render()
    return metrics.registry.get_sample_value(name, labels)


def test_the_engines_counters_go_on_rising_when_it_starts_again(metrics):
    metrics.on_stats(EngineStats(adapter_attaches=3, prefix_cache_hits=100))
    metrics.on_stats(EngineStats(adapter_attaches=5, prefix_cache_hits=100))
    metrics.on_restart()
    metrics.on_stats(EngineStats(adapter_attaches=2, prefix_cache_hits=10))
    assert value(metrics, "onebase_adapter_attaches_total") == 7
    assert value(metrics, "onebase_prefix_cache_hit_tokens_total") == 110
    assert value(metrics, "onebase_engine_restarts_total") == 1


def test_a_step_without_requests_is_no_batch(metrics):
    metrics.on_stats(EngineStats(batch_requests=4, batch_tokens=9, distinct_adapters=2, step_seconds=0.1))
    metrics.on_stats(EngineStats())
    assert value(metrics, "onebase_batch_requests_count") == 1
    assert value(metrics, "onebase_distinct_adapters_sum") == 2


def test_memory_has_a_part_for_each_of_the_engines_and_one_for_the_api(metrics):
    metrics.on_stats(EngineStats(memory=EngineMemory(weights=1, kv_cache=2, adapters=3, activations=4, runtime=5)))
    parts = ("weights", "kv_cache", "adapters", "activations", "runtime")
    assert [value(metrics, "onebase_memory_bytes", part=part) for part in parts] == [1, 2, 3, 4, 5]
    assert value(metrics, "onebase_memory_bytes", part="api") > 10 << 20


def test_vllms_names_tell_the_present_state(metrics):
    stats = EngineStats(
        running=3, waiting=1, kv_blocks_used=5, kv_blocks_total=20,
        running_adapters=("pirate@2", "bard@1", "pirate@1"), waiting_adapters=("json@1",),
    )  # fmt: skip
    metrics.on_stats(stats)
    assert value(metrics, "vllm:num_requests_running", model_name="base") == 3
    assert value(metrics, "vllm:num_requests_waiting", model_name="base") == 1
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="base") == 0.25
    labels = {"max_lora": "16", "running_lora_adapters": "bard,pirate", "waiting_lora_adapters": "json"}
    assert value(metrics, "vllm:lora_requests_info", **labels) > 1e9
    metrics.on_stats(EngineStats())
    assert value(metrics, "vllm:lora_requests_info", **labels) is None


def test_vllms_names_keep_their_colon(metrics):
    assert b'\nvllm:num_requests_running{model_name="base"} 0.0\n' in metrics.render()


def test_adapters_beyond_the_limit_share_one_label(metrics):
    for adapter in ("one", "two", "three", "four"):
        metrics.count_request([adapter], 10, 5)
    assert value(metrics, "onebase_adapter_requests_total", adapter="one") == 1
    assert value(metrics, "onebase_adapter_generated_tokens_total", adapter=OTHER) == 10
    assert value(metrics, "onebase_adapter_requests_total", adapter="three") is None


def test_an_adapter_that_grows_busier_takes_the_label_of_the_least_busy(metrics):
    metrics.count_request(["one"], 10, 5)
    metrics.count_request(["two"], 100, 5)
    metrics.count_request(["three"], 50, 5)
    assert value(metrics, "onebase_adapter_requests_total", adapter="three") == 1
    assert value(metrics, "onebase_adapter_requests_total", adapter="one") is None


def test_equally_busy_adapters_do_not_take_turns():
    labels = AdapterLabels(1)
    labels.count("one", 100)
    assert all(labels.count(adapter, 1) != ("two", "one") for _ in range(20) for adapter in ("two", "one"))


def test_a_removed_adapter_leaves_its_label_to_others(metrics):
    for adapter in ("one", "two"):
        metrics.count_request([adapter], 1, 1)
    metrics.forget_adapter("one")
    metrics.forget_adapter("never seen")
    metrics.count_request(["three"], 1, 1)
    assert value(metrics, "onebase_adapter_requests_total", adapter="one") is None
    assert value(metrics, "onebase_adapter_requests_total", adapter="three") == 1


def test_requests_for_the_base_alone_are_in_the_totals_only(metrics):
    metrics.count_request([], 7, 3)
    assert value(metrics, "onebase_prompt_tokens_total") == 7
    assert value(metrics, "onebase_generated_tokens_total") == 3
    assert b"onebase_adapter_requests_total{" not in metrics.render()
