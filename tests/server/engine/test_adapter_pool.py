"""Adapter memory: a budget of bytes, LRU among the idle, nothing pinned ever moves out, and retired versions leave."""

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from onebase_server.engine.adapter_pool import AdapterPool
from onebase_server.engine.matrix_format import MatrixFormat
from onebase_server.engine.request import AdapterRef
from onebase_server.engine.scheduler import AdapterLoading, AdapterMemoryFull, AdapterUnusable
from onebase_server.model.config import ModelConfig
from onebase_server.model.decoder_weights import DecoderNorms
from onebase_server.model.norm import RmsNorm

from .conftest import BlobWriter

Q_RANK_1 = 2 * (32 + 32)
"""Numbers of a rank-1 adapter on q_proj, in two layers."""


NO_NORMS = DecoderNorms((), RmsNorm(torch.ones(32), 1e-5))
"""No adapter here replaces any."""


class Pool(AdapterPool):
    """A pool whose loader can be waited for."""

    def __init__(self, config: ModelConfig, numbers: int) -> None:
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        super().__init__(
            config,
            (),
            NO_NORMS,
            4 * numbers,
            MatrixFormat(torch.float32),
            torch.device("cpu"),
            on_loaded=lambda: self.bell.put(None),
        )

    def acquire_loaded(self, adapter: AdapterRef) -> int:
        """Acquire, waiting for the blob to be read if it is not there yet."""
        while True:
            try:
                return self.acquire(adapter)
            except AdapterLoading:
                self.bell.get(timeout=10)

    def numbers_of(self, slot: int) -> torch.Tensor:
        """The q_proj matrices that the kernels would find for a slot in layer 0."""
        offset, rank, *_ = self.table[0, 0, slot].tolist()
        return self.arena[offset : offset + rank * 64].clone()


def combined(*parts: tuple[AdapterRef, float]) -> AdapterRef:
    return AdapterRef.combination([replace(adapter.parts[0], weight=weight) for adapter, weight in parts])


@pytest.fixture
def pool(tiny_config: ModelConfig) -> Iterator[Pool]:
    """Room for ten rank-1 adapters on q_proj."""
    pool = Pool(tiny_config, 10 * Q_RANK_1)
    yield pool
    pool.check()


def test_the_first_request_finds_the_adapter_loading_and_a_later_one_finds_it_there(
    pool: Pool, write_adapter: BlobWriter
) -> None:
    adapter = write_adapter("a", {"q_proj": 2})
    with pytest.raises(AdapterLoading):
        pool.acquire(adapter)
    pool.bell.get(timeout=10)
    slot = pool.acquire(adapter)
    assert pool.acquire(adapter) == slot
    assert pool.bytes_used == 4 * 2 * Q_RANK_1


def test_asking_whether_an_adapter_is_ready_has_it_read_and_takes_no_room(
    pool: Pool, write_adapter: BlobWriter
) -> None:
    adapter = write_adapter("a", {"q_proj": 2})
    assert not pool.is_ready(adapter)
    pool.bell.get(timeout=10)
    assert pool.is_ready(adapter)
    assert pool.num_resident == 0
    pool.acquire(adapter)
    assert pool.is_ready(adapter)


def test_kernels_are_told_the_most_ranks_at_a_place_and_how_offsets_are_aligned(
    pool: Pool, write_adapter: BlobWriter
) -> None:
    for name, ranks in (("a", {"q_proj": 1}), ("b", {"q_proj": 2, "k_proj": 1}), ("c", {"q_proj": 2})):
        pool.acquire_loaded(write_adapter(name, ranks))
    assert pool.max_rank == 3
    assert pool.alignment == 16
    assert not (pool.table[..., 0] % pool.alignment).any()


def test_the_least_recently_used_idle_adapter_makes_room(pool: Pool, write_adapter: BlobWriter) -> None:
    oldest, pinned, recent = (write_adapter(name, {"q_proj": 3}) for name in ("oldest", "pinned", "recent"))
    for adapter in (oldest, pinned, recent):
        pool.acquire_loaded(adapter)
    pool.release(oldest.digest)
    pool.release(recent.digest)
    pool.acquire_loaded(write_adapter("new", {"q_proj": 2}))
    assert pool.num_evictions == 1
    pool.acquire(recent)
    pool.acquire(pinned)
    with pytest.raises(AdapterLoading):
        pool.acquire(oldest)


def test_pinned_adapters_stay_and_a_new_one_waits(pool: Pool, write_adapter: BlobWriter) -> None:
    first, second = write_adapter("first", {"q_proj": 6}), write_adapter("second", {"q_proj": 6})
    pool.acquire_loaded(first)
    with pytest.raises(AdapterMemoryFull):
        pool.acquire_loaded(second)
    pool.release(first.digest)
    pool.acquire(second)


def test_scattered_room_is_made_one_and_every_adapter_keeps_its_numbers(pool: Pool, write_adapter: BlobWriter) -> None:
    adapters = [write_adapter(f"a{number}", {"q_proj": 2}) for number in range(5)]
    slots = [pool.acquire_loaded(adapter) for adapter in adapters]
    before = {slot: pool.numbers_of(slot) for slot in (slots[1], slots[3])}
    for number in (0, 2, 4):
        pool.release(adapters[number].digest)
        pool.retire(adapters[number].digest)
    pool.acquire_loaded(write_adapter("large", {"q_proj": 6}))
    for slot, numbers in before.items():
        torch.testing.assert_close(pool.numbers_of(slot), numbers, rtol=0, atol=0)


def test_a_retired_version_leaves_with_its_last_user(pool: Pool, write_adapter: BlobWriter) -> None:
    adapter = write_adapter("a", {"q_proj": 2})
    pool.acquire_loaded(adapter)
    pool.acquire(adapter)
    pool.retire(adapter.digest)
    pool.release(adapter.digest)
    assert pool.num_resident == 1
    pool.release(adapter.digest)
    assert (pool.num_resident, pool.bytes_used) == (0, 0)


def test_a_request_that_arrives_after_its_version_was_retired_leaves_nothing_behind(
    pool: Pool, write_adapter: BlobWriter
) -> None:
    adapter = write_adapter("a", {"q_proj": 2})
    pool.retire(adapter.digest)
    pool.acquire_loaded(adapter)
    pool.release(adapter.digest)
    assert pool.num_resident == 0


def test_a_version_that_is_live_again_stays(pool: Pool, write_adapter: BlobWriter) -> None:
    adapter = write_adapter("a", {"q_proj": 2})
    pool.retire(adapter.digest)
    pool.revive(adapter.digest)
    pool.acquire_loaded(adapter)
    pool.release(adapter.digest)
    assert pool.num_resident == 1


def test_an_adapter_larger_than_the_memory_is_unusable(pool: Pool, write_adapter: BlobWriter) -> None:
    with pytest.raises(
        AdapterUnusable, match="big@1 cannot run here: it needs 5632 bytes and the whole adapter memory has 5120"
    ):
        pool.acquire_loaded(write_adapter("big", {"q_proj": 11}))


def test_a_combination_is_the_weighted_sum_in_one_slot(pool: Pool, write_adapter: BlobWriter) -> None:
    a, b = write_adapter("a", {"q_proj": 2}), write_adapter("b", {"q_proj": 1})
    both = combined((a, 0.5), (b, -2.0))
    offset, *ranks, _ = pool.table[0, 0, pool.acquire_loaded(both)].tolist()
    lora_a, lora_b = pool.arena[offset : offset + 3 * 64].view(2, 3, 32)
    assert ranks == [3, 0, 0]
    updates = []
    for adapter in (a, b):
        numbers = pool.numbers_of(pool.acquire_loaded(adapter)).view(2, -1, 32)
        updates.append(numbers[1].T @ numbers[0])
    torch.testing.assert_close(lora_b.T @ lora_a, 0.5 * updates[0] - 2.0 * updates[1])


def test_a_combination_has_no_order_but_weights(write_adapter: BlobWriter) -> None:
    a, b = write_adapter("a", {"q_proj": 2}), write_adapter("b", {"q_proj": 1})
    assert combined((a, 0.5), (b, 2.0)) == combined((b, 2.0), (a, 0.5))
    assert combined((a, 0.5), (b, 2.0)).digest != combined((a, 2.0), (b, 0.5)).digest
    assert combined((a, 0.5)).digest != a.digest


def test_a_combination_leaves_once_one_of_its_versions_is_retired(pool: Pool, write_adapter: BlobWriter) -> None:
    a, b, c = (write_adapter(name, {"q_proj": 1}) for name in ("a", "b", "c"))
    pinned, idle, other = combined((a, 0.5), (b, 0.5)), combined((a, 0.3), (b, 0.7)), combined((b, 0.5), (c, 0.5))
    for adapter in (pinned, idle, other):
        pool.acquire_loaded(adapter)
    pool.release(idle.digest)
    pool.release(other.digest)
    pool.retire(a.digest)
    assert pool.num_resident == 2, "the idle one is gone"
    pool.release(pinned.digest)
    assert pool.num_resident == 1, "the pinned one went with its last user; the other has nothing to do with it"


def test_a_damaged_blob_harms_its_own_requests_only(pool: Pool, write_adapter: BlobWriter) -> None:
    adapter = write_adapter("a", {"q_proj": 2})
    Path(adapter.parts[0].path).write_bytes(b"not a blob")
    with pytest.raises(AdapterUnusable, match="a@1 cannot run here: Blob"):
        pool.acquire_loaded(adapter)
    pool.acquire_loaded(write_adapter("b", {"q_proj": 2}))


def test_more_adapters_than_the_table_has_rows_make_it_grow(
    tiny_config: ModelConfig, write_adapter: BlobWriter
) -> None:
    pool = Pool(tiny_config, 100 * Q_RANK_1)
    slots = [pool.acquire_loaded(write_adapter(f"a{number}", {"q_proj": 1})) for number in range(40)]
    assert len(set(slots)) == 40
    pool.check()


def test_a_withdrawn_wish_keeps_no_bytes_waiting(pool: Pool, write_adapter: BlobWriter) -> None:
    blocker, waiting = write_adapter("blocker", {"q_proj": 9}), write_adapter("waiting", {"q_proj": 5})
    pool.acquire_loaded(blocker)
    with pytest.raises(AdapterMemoryFull):
        pool.acquire_loaded(waiting)
    assert "loading=1" in repr(pool)
    pool.withdraw(waiting.digest)
    assert "loading=0" in repr(pool)
