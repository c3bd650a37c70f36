"""The parts of an engine's memory: each is what was put there, and together they are the process."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef, Attach, EngineMemory, SamplingParams, Submit
from onebase_server.model.kv_cache import kv_bytes_per_block
from onebase_server.model.weights import load_decoder
from onebase_server.process_memory import resident_bytes
from onebase_server.settings import EngineSettings

from .conftest import BlobWriter

BLOCK_SIZE = 4
RESERVED = 1 << 30
"""Bytes of the KV cache and of the adapters: far more than these tests use."""


@pytest.fixture
def make_engine(
    make_model: Callable[..., object], engine_settings: Callable[..., EngineSettings]
) -> Callable[[], Engine]:
    """Engines of a model of the same shape as the adapters of `write_adapter`."""
    make_model("llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    settings = engine_settings(kv_cache_memory=RESERVED, adapter_memory=RESERVED, block_size=BLOCK_SIZE)
    return lambda: Engine(load_decoder(Path(settings.base), settings), settings)


@pytest.fixture
def engine(make_engine: Callable[[], Engine]) -> Engine:
    return make_engine()


def memory_of(engine: Engine) -> EngineMemory:
    return engine.stats().memory


def run(engine: Engine, num_tokens: int, *, first_token: int = 1) -> None:
    """Serve one prompt of that many tokens to its end."""
    prompt = (first_token, *range(2, num_tokens + 1))
    engine.handle(Submit(request_id="a", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1)))
    while engine.has_work:
        engine.step()


def attach(engine: Engine, adapter: AdapterRef) -> None:
    engine.handle(Attach(adapter=adapter))
    while not engine.poll_attaches():
        pass


def test_the_weights_are_what_the_report_counts(engine: Engine) -> None:
    assert memory_of(engine).weights == engine.decoder.weights.report().total_bytes


def test_the_kv_cache_counts_blocks_once_they_were_used(engine: Engine) -> None:
    block = kv_bytes_per_block(engine.decoder.config, BLOCK_SIZE, engine.decoder.dtype)
    assert memory_of(engine).kv_cache == 0
    run(engine, 10 * BLOCK_SIZE)
    assert memory_of(engine).kv_cache == 10 * block
    run(engine, 10 * BLOCK_SIZE)  # the prefix cache has it
    assert memory_of(engine).kv_cache == 11 * block
    run(engine, 10 * BLOCK_SIZE, first_token=0)
    assert memory_of(engine).kv_cache == 20 * block


def test_adapters_count_what_was_attached_at_most(engine: Engine, write_adapter: BlobWriter) -> None:
    def grown() -> int:
        return memory_of(engine).adapters - empty

    empty = memory_of(engine).adapters
    small, large = write_adapter("small", {"q_proj": 2}), write_adapter("large", {"q_proj": 8, "down_proj": 8})
    attach(engine, small)
    assert grown() == engine.adapter_pool.bytes_used > 0
    attach(engine, large)
    both = grown()
    assert both == engine.adapter_pool.bytes_used
    engine.adapter_pool.retire(large.digest)
    assert engine.adapter_pool.bytes_used < grown() == both, "its pages stay, for the next adapter"


def test_the_parts_together_are_the_resident_memory(engine: Engine) -> None:
    run(engine, 8)
    memory = memory_of(engine)
    assert sum(msgspec.structs.asdict(memory).values()) == pytest.approx(resident_bytes(), abs=1 << 20)
    assert memory.runtime > 0


def test_memory_that_is_reserved_but_unused_is_not_resident(make_engine: Callable[[], Engine]) -> None:
    """This is why the parts may count used blocks, and of the arena what was used."""
    before = resident_bytes()
    engine = make_engine()
    run(engine, 32)
    assert resident_bytes() - before < RESERVED / 4
