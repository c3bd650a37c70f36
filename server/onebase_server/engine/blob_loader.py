"""Reads adapters' blobs on a thread, while steps go on. What becomes of them is the caller's business."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

from onebase_server.engine.request import AdapterRef
from onebase_server.engine.scheduler import AdapterLoading, AdapterMemoryFull, AdapterUnusable

MAX_LOADING = 8
"""Blobs on their way or waiting for room at one time: enough to keep the reader busy, too few to fill the host."""

T = TypeVar("T")


class BlobLoader(Generic[T]):
    """What `load` makes of blobs, for as long as it waits to be placed."""

    def __init__(self, load: Callable[[AdapterRef], T], on_loaded: Callable[[], None]) -> None:
        """`load` and `on_loaded`, which is called when a blob has been read, run on the thread."""
        self._load = load
        self._on_loaded = on_loaded
        self._loading: dict[str, Future[T]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")

    def __len__(self) -> int:
        return len(self._loading)

    def is_ready(self, adapter: AdapterRef) -> bool:
        """Whether it has been read, or cannot be; starts to read it otherwise."""
        loading = self._loading.get(adapter.digest)
        if loading is None:
            self._start(adapter)
        return loading is not None and loading.done()

    @contextmanager
    def loaded(self, adapter: AdapterRef) -> Iterator[T]:
        """What was read of an adapter, while room for it is found; it is kept on AdapterMemoryFull alone.

        Raises AdapterLoading while it is being read, AdapterUnusable for whatever goes wrong.
        """
        if not self.is_ready(adapter):
            raise AdapterLoading
        try:
            yield self._loading[adapter.digest].result()
        except AdapterMemoryFull:
            raise
        except Exception as error:  # whatever a damaged blob raises belongs to its requests, not to the engine
            self.drop(adapter.digest)
            raise AdapterUnusable(f"Adapter {adapter.label} cannot run here: {error}") from error
        self.drop(adapter.digest)

    def drop(self, digest: str) -> None:
        """Forget a blob, read or not."""
        self._loading.pop(digest, None)

    def _start(self, adapter: AdapterRef) -> None:
        if len(self._loading) < MAX_LOADING:
            loading = self._loading[adapter.digest] = self._thread.submit(self._load, adapter)
            loading.add_done_callback(lambda _: self._on_loaded())
