"""Progress bars on stderr, for work counted in bytes or in steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

OnProgress = Callable[[int, int], None]
"""Called with how much is done and how much there is in all."""


def ignore_progress(_done: int, _total: int) -> None:
    """For callers who show none."""


@contextmanager
def byte_progress(description: str) -> Iterator[OnProgress]:
    """A bar for bytes."""
    with _bar(description, DownloadColumn()) as on_progress:
        yield on_progress


@contextmanager
def step_progress(description: str) -> Iterator[OnProgress]:
    """A bar for steps, layers and the like; it appears with the first of them."""
    with _bar(description, MofNCompleteColumn()) as on_progress:
        yield on_progress


@contextmanager
def _bar(description: str, amount: ProgressColumn) -> Iterator[OnProgress]:
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)
