"""The tokenizer of each adapter: the base's, or what the adapter made of it.

A tokenizer that an adapter brought shares the base's model, so that it costs no more than what differs; one with a
model of its own costs several times its file. Those that were not asked for lately leave.
"""

from collections import OrderedDict
from dataclasses import dataclass

import anyio.to_thread

from onebase_adapters.store import AdapterStore
from onebase_server.model.tokenizer import Tokenizer

MAX_KEPT_BYTES = 32 << 20
"""Of the files of the tokenizers that are kept, loaded; in memory they take up to four times as much."""
LEAST_BYTES = 32 << 10
"""What a tokenizer counts for at least: a template takes more when it is compiled than as text."""


@dataclass(frozen=True, slots=True)
class _Kept:
    tokenizer: Tokenizer
    nbytes: int


class Tokenizers:
    """The base's tokenizer, and those of adapters by digest; the least recently used leave first."""

    def __init__(self, base: Tokenizer, store: AdapterStore, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self.base = base
        self._store = store
        self._max_kept_bytes = max_kept_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.kept_bytes = 0

    async def of(self, digest: str | None) -> Tokenizer:
        """The tokenizer that a version names; made in a thread, for compiling a template takes milliseconds.

        Raises:
            AdapterNotFound, StoreError: as `AdapterStore.read_tokenizer`.
        """
        if digest is None:
            return self.base
        if digest not in self._kept:
            made = await anyio.to_thread.run_sync(self._make, digest)
            if digest not in self._kept:  # two requests may have made it at the same time
                self._keep(digest, made)
        self._kept.move_to_end(digest)
        return self._kept[digest].tokenizer

    def _make(self, digest: str) -> _Kept:
        own = self._store.read_tokenizer(digest)
        return _Kept(self.base.with_own(own), max(LEAST_BYTES, len(own.tokens or "") + len(own.chat_template or "")))

    def _keep(self, digest: str, made: _Kept) -> None:
        """Add one, and let go of others if there are too many; the one that is asked for stays, however large."""
        self._kept[digest] = made
        self.kept_bytes += made.nbytes
        while self.kept_bytes > self._max_kept_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.kept_bytes -= oldest.nbytes
