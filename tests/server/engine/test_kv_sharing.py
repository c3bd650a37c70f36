"""What requests share of the KV cache: virtual tokens, prompts that start alike, and the base's part of an aLoRA's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_server.engine.request import AdapterRef

from .kv_machine import Machine, lora, prefix

INVOCATION = (7, 8)


def test_an_alora_starts_behind_what_the_base_has_computed_and_the_base_behind_an_aloras() -> None:
    machine = Machine()
    alora, document = lora("alora", *INVOCATION), [1, 2, 3, 4, 5, 6]
    machine.add("base", document, None, max_tokens=1)
    assert machine.step()[0] == {"base": (0, 6)}
    first = machine.add("invoked", [*document, 6, 6, *INVOCATION, 9, 9, 9, 9], alora, max_tokens=1)
    assert (first.first_adapted, machine.step()[0]) == (8, {"invoked": (4, 14)})
    machine.add("base again", [*document, 6, 6, 1], None, max_tokens=1)
    assert machine.step()[0] == {"base again": (8, 9)}
    machine.add("invoked again", [*document, 6, 6, *INVOCATION, 9, 9, 1], alora, max_tokens=1)
    assert machine.step()[0] == {"invoked again": (12, 13)}
    machine.add("another", [*document, 6, 6, *INVOCATION, 9, 9, 1], lora("another", *INVOCATION), max_tokens=1)
    assert machine.step()[0] == {"another": (8, 13)}


@pytest.mark.parametrize(
    ("prompt", "first_adapted"),
    [([7, 8, 1, 7, 8, 2], 3), ([7, 7, 8], 1), ([7, 8], 0), ([1, 7], None), ([8, 7], None), ([7], None)],
)
def test_an_alora_is_first_adapted_where_its_tokens_begin_for_the_last_time(
    prompt: list[int], first_adapted: int | None
) -> None:
    alora = lora("alora", *INVOCATION)
    sequence = Machine().add("a", prompt, alora)
    assert sequence.adapter == (None if first_adapted is None else alora)
    assert sequence.first_adapted == (first_adapted or 0)


def test_the_same_tokens_are_not_shared_where_an_alora_became_active_elsewhere() -> None:
    machine, alora = Machine(), lora("alora", 7)
    first = machine.add("first", [48, 48, 7], alora, max_tokens=2)
    machine.run()
    assert first.token_ids[:4] == [48, 48, 7, 7], "the block that was computed is also the next prompt's"
    machine.add("second", [48, 48, 7, 7, 1], alora, max_tokens=1)
    assert machine.step()[0] == {"second": (0, 5)}


def test_what_is_generated_invokes_nothing() -> None:
    machine = Machine()
    sequence = machine.add("a", [1, 6], lora("alora", 8), max_tokens=3)
    machine.run()
    assert 8 in sequence.token_ids
    assert sequence.adapter is None


ADAPTERS = (
    None,
    prefix("a", 1),
    prefix("b", 4),
    prefix("c", 6),
    prefix("d", 9),
    lora("e"),
    lora("f", 2),
    lora("g", 2, 2),
)


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=12), st.sampled_from(ADAPTERS)),
        min_size=1,
        max_size=12,
    ),
    aborted=st.sets(st.integers(0, 11)),
    num_blocks=st.integers(9, 20),
    budget=st.integers(1, 40),
    prefix_cache=st.booleans(),
)
def test_every_request_reads_its_own_past_whatever_the_memory_and_no_block_is_lost(
    requests: list[tuple[list[int], AdapterRef | None]],
    aborted: set[int],
    num_blocks: int,
    budget: int,
    prefix_cache: bool,
) -> None:
    machine = Machine(num_blocks, budget=budget, prefix_cache=prefix_cache)
    for number, (prompt, adapter) in enumerate(requests):
        machine.add(str(number), prompt, adapter, max_tokens=8)
    for number in sorted(aborted):  # some wait, some run, some have ended, some never were
        machine.step()
        machine.scheduler.abort(str(number))
        machine.scheduler.check()
    machine.run()
    assert machine.blocks.num_used == 0
    assert machine.prefixes.num_in_use == 0
    assert machine.prefixes.num_loading == 0


def test_a_text_behind_a_prefix_is_the_same_after_preemption() -> None:
    texts = []
    for num_blocks in (64, 9):
        machine = Machine(num_blocks)
        for number in range(4):
            machine.add(str(number), [number] * 7, ADAPTERS[number], max_tokens=12)
        texts.append(machine.run())
    assert machine.scheduler.num_preemptions > 0
    assert texts[0] == texts[1]
