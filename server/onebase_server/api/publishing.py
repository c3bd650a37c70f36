"""Changes to adapters while the server runs: the store first, then the engine.

Both doors for uploads (`adapters`, `lora_compat`) come through here. Changes of one name happen one after the other;
requests never wait for them, for each is pinned to the version it was admitted with.
"""

import asyncio
import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from anyio.to_thread import run_sync

from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.errors import AdapterNotFound, InvalidName
from onebase_adapters.store import AdapterStore
from onebase_server.api.models import adapter_ref, check_fit
from onebase_server.engine.client import EngineClient
from onebase_server.errors import EngineUnavailable, OnebaseError
from onebase_server.metrics import Metrics

logger = logging.getLogger(__name__)


class Publisher:
    """Publishes, rolls back and removes adapters."""

    def __init__(self, store: AdapterStore, engine: EngineClient, metrics: Metrics, base_name: str) -> None:
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._base_name = base_name
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def publish(
        self,
        name: str,
        directory: Path,
        *,
        expected_sha256: str | None = None,
        source_sha256: str | None = None,
    ) -> AdapterVersion:
        """Make a PEFT directory the next version of `name`, live for requests that come from now on.

        Raises:
            EngineUnavailable: the engine is not there to say whether the adapter fits.
            InvalidUpload, AdapterDoesNotFit: nothing has changed.
        """
        info = self._engine.info
        if info is None:
            raise EngineUnavailable("The engine is starting; publish the adapter again in a moment.")
        if name == self._base_name:
            raise InvalidName(f"{name} is the base's own name; an adapter of that name could not be asked for.")
        async with self._lock_of(name):
            before = await self._live_version(name)
            publish = partial(
                self._store.publish,
                name,
                directory,
                expected_sha256=expected_sha256,
                source_sha256=source_sha256,
                accept=lambda adapter: check_fit(adapter, info),
            )
            version = await run_sync(publish)
            await self._switch(before, version)
        return version

    async def rollback(self, name: str, version: int | None) -> AdapterVersion:
        """Make another version live, by default the one below; raises AdapterNotFound or VersionNotFound."""
        async with self._lock_of(name):
            before = await self._live_version(name)
            now_live = await run_sync(self._store.rollback, name, version)
            await self._switch(before, now_live)
        return now_live

    async def remove(self, name: str) -> None:
        """Remove an adapter; what runs on it runs to its end. Raises AdapterNotFound."""
        async with self._lock_of(name):
            removed = await run_sync(self._store.remove, name)
            await self._retire({version.digest for version in removed})
            self._metrics.forget_adapter(name)

    def _lock_of(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _live_version(self, name: str) -> AdapterVersion | None:
        try:
            return await run_sync(self._store.resolve, name)
        except AdapterNotFound:
            return None

    async def _switch(self, before: AdapterVersion | None, after: AdapterVersion) -> None:
        """Bring the version that is live now into device memory, and let go of the one that was.

        Raises AdapterDoesNotFit for an older version, published when the adapter memory was larger.
        """
        try:
            if self._engine.info is not None:
                check_fit(after, self._engine.info)
            attached = await self._engine.attach(adapter_ref(self._store, after))
        except EngineUnavailable:
            logger.warning("%s is published while the engine is away; its first request will load it", after.label)
            return
        finally:
            if before is not None:
                await self._retire({before.digest})
        if attached.error is not None:
            raise OnebaseError(f"{after.label} is published, but the engine cannot load it: {attached.error}")
        self._metrics.swap_duration.observe(attached.seconds)

    async def _retire(self, digests: Collection[str]) -> None:
        """Let the engine forget these, but for those that are live still, under this name or another."""
        for digest in digests:
            if not await run_sync(self._store.is_live, digest):
                self._engine.retire(digest)
