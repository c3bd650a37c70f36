"""The block pool: who holds which block, and what the prefix cache may share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_server.engine.block_pool import BlockPool, hash_block, hash_root


def hashes_of(tokens: list[int], block_size: int, adapter: str | None = None) -> list[bytes]:
    keys, parent = [], hash_root(adapter)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = hash_block(parent, tokens[start : start + block_size])
        keys.append(parent)
    return keys


def test_too_large_a_wish_takes_nothing() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    assert pool.allocate(5) is None
    assert repr(pool) == "BlockPool(used=0, free=4, cached=0)"


def test_released_blocks_are_found_again_by_their_contents() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    keys = hashes_of([1, 2, 3, 4], 2)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block, key in zip(blocks, keys, strict=True):
        pool.remember(block, key)
    pool.release(blocks)
    assert repr(pool) == "BlockPool(used=0, free=4, cached=2)"
    assert pool.match(keys) == blocks
    pool.share(blocks)
    assert repr(pool) == "BlockPool(used=2, free=2, cached=2)"
    pool.check()


def test_the_end_of_a_prefix_is_forgotten_before_its_start() -> None:
    pool = BlockPool(num_blocks=3, block_size=1)
    keys = hashes_of([1, 2, 3], 1)
    blocks = pool.allocate(3) or []
    for block, key in zip(blocks, keys, strict=True):
        pool.remember(block, key)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match(keys) == blocks[:2]


def test_blocks_without_remembered_contents_are_taken_first() -> None:
    pool = BlockPool(num_blocks=2, block_size=1)
    remembered, plain = pool.allocate(1) or [], pool.allocate(1) or []
    pool.remember(remembered[0], hashes_of([7], 1)[0])
    pool.release(remembered)
    pool.release(plain)
    assert pool.allocate(1) == plain


@pytest.mark.parametrize(
    "other",
    [hashes_of([1, 2], 2, "digest-b"), hashes_of([1, 2], 2, None), hashes_of([1, 3], 2, "digest-a")],
    ids=["another adapter", "the base", "other tokens"],
)
def test_a_block_is_shared_with_nothing_but_the_same_adapter_and_tokens(other: list[bytes]) -> None:
    pool = BlockPool(num_blocks=2, block_size=2)
    blocks = pool.allocate(1) or []
    pool.remember(blocks[0], hashes_of([1, 2], 2, "digest-a")[0])
    assert pool.match(hashes_of([1, 2], 2, "digest-a")) == blocks
    assert pool.match(other) == []


@given(st.lists(st.tuples(st.sampled_from(["take", "release"]), st.integers(0, 5)), max_size=60))
def test_blocks_are_neither_lost_nor_held_twice(moves: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks=8, block_size=2)
    tokens = [list(range(start, start + 8)) for start in (0, 0, 4, 100)]
    held: list[list[int]] = []
    for move, number in moves:
        if move == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif move == "take":
            keys = hashes_of(tokens[number % 4], 2)
            shared = pool.match(keys)
            if len(keys) - len(shared) > pool.num_free_without(shared):
                continue
            pool.share(shared)
            fresh = pool.allocate(len(keys) - len(shared))
            assert fresh is not None
            held.append(shared + fresh)
            for block, key in zip(held[-1], keys, strict=True):
                pool.remember(block, key)
        pool.check()
        assert pool.num_used == len({block for blocks in held for block in blocks})
