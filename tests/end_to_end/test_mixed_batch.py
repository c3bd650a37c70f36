"""Every row of a mixed batch is what Transformers + PEFT + bitsandbytes give for that adapter alone.

Same NF4 weights, fp32 compute: log-probabilities within 1e-4 relative over the whole vocabulary, and the same greedy
text; in one batch, in chunks, from the prefix cache, after preemption, and with adapters swapped in between.
"""

import random
import time
from collections.abc import Callable

import pytest
import torch

from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.store import AdapterStore
from onebase_kernels import BackendName
from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef, Attach, Retire, SamplingParams, Submit, TokenOutput

from .conftest import ADAPTERS, NEXT_RANK8, PREFIXES, VOCAB, MakeEngine, Oracle, publish

ANSWER = 12
ROWS: tuple[tuple[str, str | None], ...] = (
    ("base-1", None),
    *((name, name) for name in (*ADAPTERS, *PREFIXES)),
    *((f"{name}-2", name) for name in PREFIXES),
    ("base-2", None),
)
"""Two rows of the base among one of each low-rank adapter and two of each prefix."""


def prompt_of(row: str) -> list[int]:
    """A prompt of 9 to 30 tokens, its own for each row."""
    rng = random.Random(row)
    return [rng.randrange(2, VOCAB) for _ in range(rng.randrange(9, 31))]


def submit(engine: Engine, row: str, adapter: AdapterRef | None) -> None:
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, logprobs=VOCAB)
    engine.handle(Submit(request_id=row, prompt_token_ids=tuple(prompt_of(row)), sampling=sampling, adapter=adapter))


def run(engine: Engine, *, between_steps: Callable[[int], None] = lambda _: None) -> dict[str, list[TokenOutput]]:
    """Step until all is said; outputs by row."""
    outputs: dict[str, list[TokenOutput]] = {}
    deadline = time.monotonic() + 60
    step = 0
    while engine.has_work:
        assert time.monotonic() < deadline, f"stuck: {engine.scheduler!r}"
        engine.poll_attaches()
        result = engine.step()
        engine.check()
        for output in result.outputs:
            assert output.error is None, output.error
            outputs.setdefault(output.request_id, []).append(output)
        if result.stats.batch_tokens == 0:
            time.sleep(0.001)  # an adapter is being read
        else:
            between_steps(step)
            step += 1
    return outputs


def assert_like_oracle(outputs: list[TokenOutput], row: str, adapter: str | None, oracle: Oracle) -> None:
    """The row's text and its log-probabilities at every position are the oracle's."""
    expected_tokens, expected = oracle.answer(tuple(prompt_of(row)), adapter, ANSWER)
    assert [token for output in outputs for token in output.token_ids] == expected_tokens, f"{row}: another text"
    reports = [report for output in outputs for report in output.logprobs or ()]
    for position, report in enumerate(reports):
        ours = torch.empty(VOCAB)
        for token, logprob in report.top:
            ours[token] = logprob
        error = (ours - expected[position]).norm() / expected[position].norm()
        assert error < 1e-4, f"{row}: relative error {error:.1e} at answer token {position}"


def submit_all(engine: Engine, adapters: dict[str, AdapterRef]) -> None:
    for row, adapter in ROWS:
        submit(engine, row, adapters[adapter] if adapter else None)


def low_rank(store: AdapterStore) -> list[AdapterVersion]:
    """The live adapters that need adapter memory; prefixes live in the KV cache."""
    return [version for version in store.list_adapters() if not version.num_virtual_tokens]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 64, "max_num_seqs": 3},
        {"double_quant": True, "prefix_cache": False},
    ],
    ids=["one batch", "chunked prefill", "three at a time", "no prefix cache"],
)
def test_each_row_of_a_mixed_batch_is_what_it_is_alone(
    settings: dict[str, int], make_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle
) -> None:
    engine = make_engine(**settings)
    submit_all(engine, adapters)
    outputs = run(engine)
    for row, adapter in ROWS:
        assert_like_oracle(outputs[row], row, adapter, oracle)


@pytest.mark.parametrize("backend", ["reference", "bitsandbytes"])
def test_the_other_back_ends_say_the_same(
    backend: BackendName, make_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle
) -> None:
    engine = make_engine(backend)
    submit_all(engine, adapters)
    outputs = run(engine)
    for row, adapter in ROWS:
        assert_like_oracle(outputs[row], row, adapter, oracle)


def first_logprobs(outputs: list[TokenOutput]) -> torch.Tensor:
    """Of all tokens, after the prompt."""
    report = next(report for output in outputs for report in output.logprobs or ())
    return torch.tensor([logprob for _, logprob in sorted(report.top)])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_adapters_in_8_bits_stay_near_the_oracle_and_say_the_same_alone_and_in_a_batch(
    backend: BackendName, make_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle
) -> None:
    engine = make_engine(backend, adapter_quantization="int8")
    submit_all(engine, adapters)
    together = run(engine)
    for row, adapter in ROWS:
        submit(engine, row, adapters[adapter] if adapter else None)
        alone = run(engine)[row]
        assert [output.token_ids for output in alone] == [output.token_ids for output in together[row]], row
        _, expected = oracle.answer(tuple(prompt_of(row)), adapter, ANSWER)
        error = (first_logprobs(together[row]) - expected[0]).norm() / expected[0].norm()
        assert error < (2e-2 if adapter in ADAPTERS else 1e-4), f"{row}: relative error {error:.1e}"


def test_prefix_cache_hits_change_nothing(
    make_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle
) -> None:
    engine = make_engine()
    for _ in range(2):
        submit_all(engine, adapters)
        outputs = run(engine)
    for row, adapter in ROWS:
        assert outputs[row][0].num_cached_tokens >= 5, "this row should have come from the cache"
        assert_like_oracle(outputs[row], row, adapter, oracle)


def test_preemption_changes_nothing(make_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle) -> None:
    bytes_per_token = 3 * 2 * 2 * 32 * 4  # layers, K and V, KV heads, head size, fp32
    engine = make_engine(kv_cache_memory=100 * bytes_per_token)
    submit_all(engine, adapters)
    outputs = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for row, adapter in ROWS:
        assert_like_oracle(outputs[row], row, adapter, oracle)


def test_adapters_that_take_turns_in_memory_change_nothing(
    make_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle, store: AdapterStore
) -> None:
    largest = max(version.num_parameters for version in low_rank(store))
    engine = make_engine(adapter_memory=4 * largest + 64)
    for _ in range(2):
        submit_all(engine, adapters)
        outputs = run(engine)
    assert engine.adapter_pool.num_evictions > 0
    for row, adapter in ROWS:
        assert_like_oracle(outputs[row], row, adapter, oracle)


def test_a_version_swapped_in_between_serves_new_requests_and_leaves_running_ones_alone(
    make_engine: MakeEngine, adapters: dict[str, AdapterRef], oracle: Oracle, store: AdapterStore
) -> None:
    engine = make_engine()
    submit_all(engine, adapters)

    def swap(step: int) -> None:
        if step == 3:
            engine.handle(Attach(adapter=publish(store, "rank8", oracle.directory / NEXT_RANK8)))
            engine.handle(Retire(digest=adapters["rank8"].digest))
        if step == 5:
            submit(engine, "base-1-again", None)
            submit(engine, "swapped", publish(store, "rank8", oracle.directory / NEXT_RANK8))

    outputs = run(engine, between_steps=swap)
    for row, adapter in ROWS:
        assert_like_oracle(outputs[row], row, adapter, oracle)
    assert_like_oracle(outputs["base-1-again"], "base-1-again", None, oracle)
    assert_like_oracle(outputs["swapped"], "swapped", NEXT_RANK8, oracle)
    live_bytes = 4 * sum(version.num_parameters for version in low_rank(store))
    assert engine.adapter_pool.bytes_used == live_bytes, "the old version's memory is free again"
