"""CUDA graphs: what a function launches is captured once, and replayed with a single launch."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: libraries keep a workspace for every stream that they have computed on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch has no types for it


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: a graph among it would be destroyed, which aborts a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CapturedGraph(Generic[R]):
    """What a function launches; to be called as the function is.

    Garbage that holds memory of the device is not collected for it: whoever captures many does so once beforehand.
    """

    def __init__(self, run: Callable[[], R], pool: Any = None) -> None:
        """Call `run` twice: it must launch the same each time, on memory that stays, and never wait for the device.

        What it returns the second time is returned by each replay, which writes it anew. Graphs of one `pool`
        (`torch.cuda.graph_pool_handle()`) share their memory, so no two of them may run at the same time.
        """
        # Kernels are compiled and libraries set up workspaces on the first call, which must not happen during capture.
        stream = _capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self._run = run  # kept with all that it reads
        self._graph = torch.cuda.CUDAGraph()
        # Where a capture fails, torch does not go back to the stream before, so there is a context of ours around it.
        with _no_collection(), torch.cuda.stream(stream), torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self._result = run()

    def __call__(self) -> R:
        """Replay it."""
        self._graph.replay()
        return self._result
