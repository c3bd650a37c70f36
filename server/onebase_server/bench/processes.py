"""A server's processes on this machine, and the CPU time that they use. It needs psutil."""

import contextlib
from collections.abc import Iterator

import psutil

from onebase_server.errors import ConfigurationError


def find_process(pid: int) -> psutil.Process:
    """Raises ConfigurationError if there is no such process."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess as error:
        raise ConfigurationError(f"There is no process {pid} on this machine, so it cannot be watched.") from error


def process_tree(root: psutil.Process) -> Iterator[psutil.Process]:
    """A process and all its descendants; none if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from (root, *root.children(recursive=True))


def cpu_seconds(root: psutil.Process) -> float:
    """CPU time that a process and its living descendants have used since they started."""
    seconds = 0.0
    for process in process_tree(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds
