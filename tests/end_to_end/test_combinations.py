"""A row on a weighted combination of adapters is what PEFT gives for their exact weighted sum (`cat`)."""

import pytest
from msgspec.structs import replace

from onebase_adapters.store import AdapterStore
from onebase_kernels import BackendName
from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef, Attach, Retire

from .conftest import NEXT_RANK8, MakeEngine, Oracle, publish
from .test_mixed_batch import assert_like_oracle, run, submit

COMBINATIONS: dict[str, dict[str, float]] = {
    "two": {"rank4": 0.7, "rank64": 0.3},
    "the same two": {"rank4": 0.2, "rank64": 0.8},
    "three": {"rank8": 0.5, "rslora": -0.4, "patterns": 1.0},
    "half of one": {"rank16": 0.5},
}
"""Ranks and targets that overlap and that do not, weights that sum to one and that do not."""
ROWS = {"base": None, "rank4": "rank4", "rank64": "rank64"} | {name: name for name in COMBINATIONS}


@pytest.fixture(scope="module")
def combining_oracle(oracle: Oracle) -> Oracle:
    """The oracle with all of COMBINATIONS."""
    for name, weights in COMBINATIONS.items():
        oracle.models[name] = oracle.models["rank4"]
        oracle.models[name].add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
    return oracle


@pytest.fixture
def refs(adapters: dict[str, AdapterRef]) -> dict[str, AdapterRef]:
    """The published adapters and all of COMBINATIONS."""
    return adapters | {
        name: AdapterRef.combination([replace(adapters[part].parts[0], weight=w) for part, w in weights.items()])
        for name, weights in COMBINATIONS.items()
    }


def submit_all(engine: Engine, refs: dict[str, AdapterRef]) -> None:
    for row, adapter in ROWS.items():
        submit(engine, row, refs[adapter] if adapter else None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_combinations_in_a_mixed_batch_are_pefts_weighted_sums(
    backend: BackendName, make_engine: MakeEngine, refs: dict[str, AdapterRef], combining_oracle: Oracle
) -> None:
    engine = make_engine(backend)
    submit_all(engine, refs)
    outputs = run(engine)
    for row, adapter in ROWS.items():
        assert_like_oracle(outputs[row], row, adapter, combining_oracle)


def test_the_prefix_cache_tells_weights_apart(
    make_engine: MakeEngine, refs: dict[str, AdapterRef], combining_oracle: Oracle
) -> None:
    engine = make_engine()
    for name in ("two", "the same two", "two"):
        submit(engine, "one prompt", refs[name])
        outputs = run(engine)
        assert_like_oracle(outputs["one prompt"], "one prompt", name, combining_oracle)
    assert outputs["one prompt"][0].num_cached_tokens >= 8, "the second time the combination should have come from it"


def test_combinations_that_take_turns_in_memory_change_nothing(
    make_engine: MakeEngine, refs: dict[str, AdapterRef], combining_oracle: Oracle, store: AdapterStore
) -> None:
    sizes = {version.name: version.num_parameters for version in store.list_adapters()}
    largest = max(sum(sizes[part] for part in weights) for weights in COMBINATIONS.values())
    engine = make_engine(adapter_memory=4 * largest + 64)
    submit_all(engine, refs)
    outputs = run(engine)
    assert engine.adapter_pool.num_evictions > 0
    for row, adapter in ROWS.items():
        assert_like_oracle(outputs[row], row, adapter, combining_oracle)


def test_a_combination_runs_to_its_end_on_versions_that_were_swapped_and_is_gone_then(
    make_engine: MakeEngine, refs: dict[str, AdapterRef], combining_oracle: Oracle, store: AdapterStore, oracle: Oracle
) -> None:
    engine = make_engine()
    submit_all(engine, refs)

    def swap(step: int) -> None:
        if step == 3:
            engine.handle(Attach(adapter=publish(store, "rank8", oracle.directory / NEXT_RANK8)))
            engine.handle(Retire(digest=refs["rank8"].digest))
        if step == 5:
            submit(engine, "three, late", refs["three"])

    outputs = run(engine, between_steps=swap)
    for row, adapter in ROWS.items():
        assert_like_oracle(outputs[row], row, adapter, combining_oracle)
    assert_like_oracle(outputs["three, late"], "three, late", "three", combining_oracle)
    before = engine.adapter_pool.num_attaches
    submit(engine, "base", refs["two"])
    run(engine)
    assert engine.adapter_pool.num_attaches == before, "two's versions are live, so it stays"
    submit(engine, "base", refs["three"])
    run(engine)
    assert engine.adapter_pool.num_attaches == before + 1, "three's memory was free again"
