"""What a step's ops share: made once for a batch, by the first op that asks, and kept as long as the batch is.

A captured CUDA graph reads it at every replay, so it must not go before the batch that the graph was captured with.
"""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

B = TypeVar("B")
P = ParamSpec("P")
R = TypeVar("R")


def once_per_batch(make: Callable[Concatenate[B, P], R]) -> Callable[Concatenate[B, P], R]:
    """`make`, whose result for a batch and further arguments is remembered while the batch lives."""
    made: WeakKeyDictionary[B, dict[Hashable, Any]] = WeakKeyDictionary()

    @wraps(make)
    def remembered(batch: B, /, *args: P.args, **kwargs: P.kwargs) -> R:
        of_batch = made.setdefault(batch, {})
        key = (args, *kwargs.items())
        if key not in of_batch:
            of_batch[key] = make(batch, *args, **kwargs)
        result: R = of_batch[key]
        return result

    return remembered
