"""Prefixes in the KV cache: written once, shared by all, and given away when nobody uses them."""

from collections.abc import Iterator

import pytest

from onebase_server.engine.scheduler import AdapterLoading, AdapterMemoryFull, AdapterUnusable

from .kv_machine import MAX_MODEL_LEN, Machine, prefix


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.blocks.check()


def test_a_prefix_is_written_once_and_no_request_computes_it(machine: Machine) -> None:
    adapter = machine.attach(prefix("a", 6))
    first, second = (machine.add(name, [1, 2, 3], adapter) for name in ("first", "second"))
    assert machine.step()[0] == {"first": (6, 9), "second": (6, 9)}
    assert machine.memory.num_written == {"a": 1}
    assert first.block_table[0] == second.block_table[0], "the full block is shared"
    assert first.block_table[1] != second.block_table[1], "of the other each has a copy"


def test_virtual_tokens_are_no_part_of_what_is_reported(machine: Machine) -> None:
    adapter = machine.attach(prefix("a", 6))
    for name in ("first", "again"):
        machine.add(name, [1, 2, 3, 4, 5, 6, 7], adapter, max_tokens=1)
        _, outputs = machine.step()
        assert outputs[0].num_cached_tokens == (0 if name == "first" else 6)
    assert (machine.scheduler.prefix_cache_queries, machine.scheduler.prefix_cache_hits) == (14, 6)


def test_a_prefix_is_shared_where_the_prefix_cache_is_off() -> None:
    machine = Machine(prefix_cache=False)
    adapter = machine.attach(prefix("a", 8))
    for name in ("first", "again"):
        machine.add(name, [1, 2, 3], adapter, max_tokens=1)
        assert machine.step()[0] == {name: (8, 11)}
    assert machine.memory.num_written == {"a": 1}


def test_an_idle_prefix_stays_until_its_blocks_are_needed(machine: Machine) -> None:
    adapter = machine.attach(prefix("a", 6))
    machine.acquire(adapter)
    machine.prefixes.release("a")
    assert machine.memory.num_written == {"a": 1}
    machine.blocks.release(machine.blocks.allocate(machine.blocks.num_blocks) or [])
    machine.acquire(adapter)
    assert machine.memory.num_written == {"a": 2}


def test_only_what_was_given_away_of_a_prefix_is_allocated_again(machine: Machine) -> None:
    adapter = prefix("a", 12)
    before = machine.acquire(adapter)
    machine.prefixes.release("a")
    machine.blocks.allocate(machine.blocks.num_blocks - 2)  # the last block of a prefix leaves before its first ones
    with pytest.raises(AdapterMemoryFull):
        machine.acquire(adapter)
    machine.blocks.release([before[2]])
    assert machine.acquire(adapter)[:2] == before[:2]


def test_versions_of_a_prefix_share_nothing(machine: Machine) -> None:
    first, second = (machine.acquire(prefix(name, 8)) for name in ("version-1", "version-2"))
    assert not set(first) & set(second)


def test_a_prefix_beyond_the_context_is_unusable(machine: Machine) -> None:
    with pytest.raises(AdapterUnusable, match=r"long@1 cannot run here: its 32 virtual tokens leave no room .* of 32"):
        machine.acquire(prefix("long", MAX_MODEL_LEN))


def test_a_damaged_blob_harms_its_own_requests_only(machine: Machine) -> None:
    machine.add("bad", [1], prefix("bad", 4, path="damaged"))
    machine.add("good", [1], prefix("good", 4), max_tokens=1)
    ends = {output.request_id: output for _ in range(3) for output in machine.step()[1]}
    assert ends["bad"].error == "Adapter bad@1 cannot run here: Blob damaged is damaged."
    assert ends["good"].error is None
    assert machine.blocks.num_used == 0


def test_a_prefix_is_ready_once_it_was_read_and_while_its_blocks_are_remembered(machine: Machine) -> None:
    adapter = prefix("a", 4)
    assert not machine.prefixes.is_ready(adapter)
    machine.bell.get(timeout=10)
    assert machine.prefixes.is_ready(adapter)
    machine.prefixes.acquire(adapter)
    assert machine.prefixes.is_ready(adapter)
    machine.prefixes.release(adapter.digest)
    assert machine.prefixes.is_ready(adapter)
    assert machine.prefixes.num_loading == 0


def test_a_withdrawn_wish_keeps_no_bytes_waiting(machine: Machine) -> None:
    with pytest.raises(AdapterLoading):
        machine.prefixes.acquire(prefix("a", 4))
    assert machine.prefixes.num_loading == 1
    machine.prefixes.withdraw("a")
    assert machine.prefixes.num_loading == 0
