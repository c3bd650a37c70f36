"""Prefixes in the KV cache: each is written once, into blocks that all requests of its adapter start with.

While requests use a prefix its blocks are held. Between them they are free but remembered, as the prefix cache's are,
so that one rule decides for both what leaves first: the least recently used. A prefix of which a block was given away
is read and written again at its next use. It knows blocks by number and no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from onebase_server.engine.blob_loader import BlobLoader
from onebase_server.engine.block_pool import BlockPool, hash_prefix
from onebase_server.engine.request import AdapterRef
from onebase_server.engine.scheduler import AdapterMemoryFull, AdapterUnusable

T = TypeVar("T")


class BlockWriter(Protocol[T]):
    """What the pool asks of the memory behind the blocks; T is a prefix as it was read."""

    def read(self, adapter: AdapterRef) -> T:
        """Read the adapter's blob; runs on another thread."""

    def write(self, prefix: T, blocks: list[int]) -> None:
        """Make keys and values of all its virtual tokens, in these blocks, in order."""

    def copy(self, source: int, target: int) -> None:
        """Copy what a block holds to another."""


@dataclass(slots=True)
class PrefixInUse:
    """A prefix that at least one request stands behind."""

    blocks: list[int]
    num_users: int = 0


class PrefixPool(Generic[T]):
    """Which prefixes are in use, and in which blocks."""

    def __init__(
        self,
        block_pool: BlockPool,
        writer: BlockWriter[T],
        max_model_len: int,
        *,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_attaches = 0
        self._block_pool = block_pool
        self._writer = writer
        self._max_model_len = max_model_len
        self._in_use: dict[str, PrefixInUse] = {}
        self._loader = BlobLoader(writer.read, on_loaded)

    def __repr__(self) -> str:
        return f"PrefixPool(in_use={self.num_in_use}, loading={self.num_loading})"

    @property
    def num_in_use(self) -> int:
        """Prefixes that requests stand behind."""
        return len(self._in_use)

    @property
    def num_loading(self) -> int:
        """Prefixes that are being read, or wait for room."""
        return len(self._loader)

    def is_ready(self, adapter: AdapterRef) -> bool:
        """Whether `acquire` need not wait for the adapter's blob, which is read from now on if it was not before."""
        if adapter.digest in self._in_use:
            return True
        keys = self._keys(adapter)
        return len(self._block_pool.match(keys)) == len(keys) or self._loader.is_ready(adapter)

    def acquire(self, adapter: AdapterRef) -> None:
        """Hold the blocks of an adapter's prefix.

        Raises AdapterLoading while its blob is read, AdapterMemoryFull while too few blocks are free, AdapterUnusable
        if it can never run here.
        """
        prefix = self._in_use.get(adapter.digest)
        if prefix is None:
            prefix = self._in_use[adapter.digest] = PrefixInUse(self._hold_blocks(adapter))
        prefix.num_users += 1

    def release(self, digest: str) -> None:
        """Undo one `acquire`."""
        prefix = self._in_use[digest]
        prefix.num_users -= 1
        if prefix.num_users == 0:
            self._block_pool.release(prefix.blocks)
            del self._in_use[digest]

    def withdraw(self, digest: str) -> None:
        """A sequence that waited for this prefix is gone: do not keep its bytes waiting for room."""
        self._loader.drop(digest)

    def blocks(self, digest: str) -> list[int]:
        """The blocks of a prefix in use, in order; the last may not be full."""
        return self._in_use[digest].blocks

    def copy_block(self, source: int, target: int) -> None:
        """Copy what a block holds to another."""
        self._writer.copy(source, target)

    def _keys(self, adapter: AdapterRef) -> list[bytes]:
        """By which its blocks are remembered."""
        return hash_prefix(adapter.digest, self._block_pool.blocks_for(adapter.num_virtual_tokens))

    def _hold_blocks(self, adapter: AdapterRef) -> list[int]:
        """The prefix's blocks as they are remembered, or written anew."""
        if adapter.num_virtual_tokens >= self._max_model_len:
            raise AdapterUnusable(
                f"Adapter {adapter.label} cannot run here: its {adapter.num_virtual_tokens} virtual tokens leave no "
                f"room for a prompt in a context of {self._max_model_len} tokens."
            )
        pool = self._block_pool
        keys = self._keys(adapter)
        blocks = pool.match(keys)
        if len(blocks) == len(keys):
            pool.share(blocks)
            return blocks
        with self._loader.loaded(adapter) as prefix:
            if len(keys) - len(blocks) > pool.num_free_without(blocks):
                raise AdapterMemoryFull
            pool.share(blocks)
            blocks += pool.allocate(len(keys) - len(blocks)) or []
        self._writer.write(prefix, blocks)
        for block, key in zip(blocks, keys, strict=True):
            pool.remember(block, key)
        self.num_attaches += 1
        return blocks
