"""All kinds of adapters behind one door: low-rank pairs live in the arena, prefixes in blocks of the KV cache."""

from onebase_server.engine.adapter_pool import AdapterPool
from onebase_server.engine.prefix_pool import PrefixPool
from onebase_server.engine.prefix_writer import HostPrefix
from onebase_server.engine.request import AdapterRef
from onebase_server.engine.sequence import NO_SLOT


class ResidentAdapters:
    """What the scheduler asks of adapter memory (`scheduler.Adapters`), and what the API tells of versions."""

    def __init__(self, adapter_pool: AdapterPool, prefix_pool: PrefixPool[HostPrefix]) -> None:
        self._adapter_pool = adapter_pool
        self._prefix_pool = prefix_pool

    def is_ready(self, adapter: AdapterRef) -> bool:
        """Whether `acquire` need not wait for the adapter's blob, which is read from now on if it was not before."""
        return self._pool_of(adapter).is_ready(adapter)

    def acquire(self, adapter: AdapterRef) -> int:
        """Pin an adapter and return its slot; NO_SLOT for a prefix, behind which rows are the base's.

        Raises AdapterLoading, AdapterMemoryFull or AdapterUnusable.
        """
        if not adapter.num_virtual_tokens:
            return self._adapter_pool.acquire(adapter)
        self._prefix_pool.acquire(adapter)
        return NO_SLOT

    def release(self, adapter: AdapterRef) -> None:
        """Undo one `acquire`."""
        self._pool_of(adapter).release(adapter.digest)

    def withdraw(self, adapter: AdapterRef) -> None:
        """A sequence that waited for this adapter is gone."""
        self._pool_of(adapter).withdraw(adapter.digest)

    def prefix_blocks(self, adapter: AdapterRef) -> list[int]:
        """The blocks that hold a pinned adapter's virtual tokens, in order; none if it has none."""
        return self._prefix_pool.blocks(adapter.digest) if adapter.num_virtual_tokens else []

    def copy_block(self, source: int, target: int) -> None:
        """Copy keys and values of a block of the KV cache to another."""
        self._prefix_pool.copy_block(source, target)

    def retire(self, digest: str) -> None:
        """An adapter version is no longer live: its memory is free as soon as nobody uses it.

        A prefix's blocks are so anyway.
        """
        self._adapter_pool.retire(digest)
        self._prefix_pool.withdraw(digest)

    def revive(self, digest: str) -> None:
        """An adapter version is live (again)."""
        self._adapter_pool.revive(digest)

    def _pool_of(self, adapter: AdapterRef) -> AdapterPool | PrefixPool[HostPrefix]:
        return self._prefix_pool if adapter.num_virtual_tokens else self._adapter_pool
