"""Who is timed beside the back end in question, and what they are called with."""

from collections.abc import Callable, Mapping, Sequence

from onebase_kernels import BackendName
from onebase_server.bench.kernels.trial import Call, Contender
from onebase_server.bench.kernels.workbench import Workbench


def against_reference(bench: Workbench, calls: Sequence[Call]) -> tuple[Contender, ...]:
    """The back end and the reference, for ops that no peer computes in a way of its own."""
    return contenders(dict.fromkeys(bench.rivals("reference"), calls))


def contenders(
    calls: Mapping[BackendName, Sequence[Call]], unrecorded: Sequence[BackendName] = ()
) -> tuple[Contender, ...]:
    """One for each back end; the reference and those `unrecorded` are called one by one."""
    return tuple(
        Contender(backend, its_calls, backend, is_recordable=backend not in ("reference", *unrecorded))
        for backend, its_calls in calls.items()
    )


def regardless_of_step(op: Callable[..., object], *operands: object) -> Call:
    """An op that computes from its operands alone."""
    return lambda _: op(*operands)
