"""The tokenizer of each adapter: the base's, or what the adapter made of it.

A tokenizer that an adapter brought shares the base's model, so that it costs no more than what differs; those that are
not asked for leave all the same.
"""

from collections import OrderedDict
from functools import partial

import anyio.to_thread

from onebase_adapters.store import AdapterStore
from onebase_server.model.tokenizer import Tokenizer

MAX_KEPT = 1024
"""How many adapters' tokenizers are kept."""


class Tokenizers:
    """The base's tokenizer, and those of adapters by digest; the least recently used leave first."""

    def __init__(self, base: Tokenizer, store: AdapterStore, max_kept: int = MAX_KEPT) -> None:
        self.base = base
        self._store = store
        self._max_kept = max_kept
        self._kept: OrderedDict[str, Tokenizer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    async def of(self, digest: str | None) -> Tokenizer:
        """The tokenizer that a version names; made in a thread, for compiling a template takes milliseconds.

        Raises:
            AdapterNotFound, StoreError: as `AdapterStore.read_tokenizer`.
        """
        if digest is None:
            return self.base
        if digest not in self._kept:
            self._kept[digest] = await anyio.to_thread.run_sync(partial(self._load, digest))
        self._kept.move_to_end(digest)
        tokenizer = self._kept[digest]
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return tokenizer

    def _load(self, digest: str) -> Tokenizer:
        return self.base.with_own(self._store.read_tokenizer(digest))
