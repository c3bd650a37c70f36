"""The arena's allocator: extents are disjoint, the smallest hole is used, and compaction closes all gaps."""

from hypothesis import given
from hypothesis import strategies as st

from onebase_server.engine.extents import Extents, Move


def test_the_smallest_hole_that_fits_is_used() -> None:
    extents = Extents(100)
    first, second, third, _ = (extents.allocate(size) for size in (30, 10, 20, 10))
    assert (first, second, third) == (0, 30, 40)
    extents.release(0)
    extents.release(40)
    assert extents.allocate(20) == 40


def test_a_full_arena_gives_nothing_and_keeps_what_it_has() -> None:
    extents = Extents(10)
    extents.allocate(8)
    assert extents.allocate(3) is None
    assert repr(extents) == "Extents(used=8, free=2, holes=1)"


def test_compaction_moves_everything_down_in_order() -> None:
    extents = Extents(12)
    for size in (2, 3, 4, 3):
        extents.allocate(size)
    extents.release(0)
    extents.release(5)
    assert extents.allocate(6) is None
    assert extents.compact() == [Move(2, 0, 3), Move(9, 3, 3)]
    assert extents.allocate(6) == 6


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=50))
def test_extents_stay_disjoint_and_keep_their_contents(moves: list[tuple[bool, int]]) -> None:
    extents, memory, owners = Extents(64), [0] * 64, {}
    for serial, (take, number) in enumerate(moves, start=1):
        if not take and owners:
            offset = sorted(owners)[number % len(owners)]
            extents.release(offset)
            del owners[offset]
        elif take and number <= extents.free:
            offset = extents.allocate(number)
            if offset is None:
                for move in extents.compact():
                    memory[move.target : move.target + move.size] = memory[move.source : move.source + move.size]
                    owners[move.target] = owners.pop(move.source)
                offset = extents.allocate(number)
            assert offset is not None, "after compaction every free number is usable"
            owners[offset] = (number, serial)
            memory[offset : offset + number] = [serial] * number
        extents.check()
    for offset, (size, serial) in owners.items():
        assert memory[offset : offset + size] == [serial] * size
