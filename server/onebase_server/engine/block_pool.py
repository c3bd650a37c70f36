"""Blocks of the KV cache: who holds which, and which full blocks can be shared by prompts that start alike.

Bookkeeping only: it knows block numbers, not the memory behind them, and no torch.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full block: its tokens and, through `parent`, everything before them.

    The first block's parent is `hash_root(adapter digest)`: keys and values depend on the adapter, so that blocks are
    never shared between adapters, nor between versions of one. An adapter that computes from a later token on shares
    the base's blocks up to there, and from there `hash_activation` is the parent.
    """
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


def hash_prefix(adapter_digest: str, num_blocks: int) -> list[bytes]:
    """Keys of the blocks of an adapter's prefix: its virtual tokens have no ids, so that their place alone tells."""
    keys = [hash_root(adapter_digest)]
    for _ in range(num_blocks):
        keys.append(hash_block(keys[-1], ()))
    return keys[1:]


def hash_root(adapter_digest: str | None) -> bytes:
    """The parent of a sequence's first block."""
    return hashlib.blake2b((adapter_digest or "").encode(), digest_size=16, person=b"onebase prefix").digest()


def hash_activation(parent: bytes, adapter_digest: str, position: int) -> bytes:
    """The parent of the block with the first token that an adapter computes, at that position, behind the base's.

    The position does not follow from the tokens: what invokes an adapter once more later on leaves these to the base.
    """
    activation = position.to_bytes(8, "little") + adapter_digest.encode()
    return hashlib.blake2b(parent + activation, digest_size=16, person=b"onebase active").digest()


class BlockPool:
    """A fixed number of blocks, each free, held by sequences and prefixes, or free but remembered for its contents.

    Free blocks are taken in LRU order, so that remembered contents survive as long as there is room.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_touched = 0
        """Blocks that have been held at least once; the others' memory was never written."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}

    def __repr__(self) -> str:
        return f"BlockPool(used={self.num_used}, free={self.num_free}, cached={len(self._block_of_hash)})"

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, remembered ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that are held."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of remembered blocks for a sequence's block hashes; it takes no hold of them."""
        blocks = []
        for key in hashes:
            block = self._block_of_hash.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """Blocks that stay free once `blocks` are shared."""
        return self.num_free - sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more hold of each block that `match` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, forgetting what the oldest remembered; None (and nothing taken) if there are too few."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        self.num_touched = max([self.num_touched, *(block + 1 for block in blocks)])  # fresh ones come in order
        for block in blocks:
            self._forget(block)
            self._references[block] = 1
        return blocks

    def remember(self, block: int, key: bytes) -> None:
        """A held block is computed: let later prompts find it. The first block with a key stays its block."""
        if self._hash_of_block[block] is None and key not in self._block_of_hash:
            self._hash_of_block[block] = key
            self._block_of_hash[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, its last first: a prefix is worth more than what follows it."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of_block[block] is None:
                    self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        key = self._hash_of_block[block]
        if key is not None:
            del self._block_of_hash[key]
            self._hash_of_block[block] = None

    def check(self) -> None:
        """Raise AssertionError unless every block is either free or held, and every remembered key has its block."""
        for block, references in enumerate(self._references):
            assert references >= 0, f"block {block} was released too often"
            assert (references == 0) == (block in self._free), (
                f"block {block}: {references} holds, yet in the wrong list"
            )
        for key, block in self._block_of_hash.items():
            assert self._hash_of_block[block] == key, f"block {block} forgot its key"
