"""What is timed: an op on one shape, by several who compute the same. Plain data; it computes nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onebase_kernels import BackendName, StepInputs

Call = Callable[[StepInputs], object]
"""One op, as a decoder calls it in a step."""


@dataclass(frozen=True)
class Work:
    """What one call cannot do without, counted by formula."""

    bytes: int
    """Every operand read once, every result written once."""
    flops: int
    """Multiplications and additions; 0 where numbers are only moved."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an op."""

    name: str
    calls: Sequence[Call]
    """The same work on different memory each, so that gone through in turn they find no operand in a cache that would
    not be there in serving."""
    backend: BackendName | None = None
    """What must have been chosen by `use_backend` when a call is made; None where it does not matter."""
    is_recordable: bool = True
    """Whether its calls can be recorded, as a program or as a CUDA graph: they compute by their back end's ops alone,
    and never wait for the device."""


@dataclass(frozen=True)
class Trial:
    """An op on one shape and number of rows; the first contender is the one that the others are compared with."""

    op: str
    variant: str
    """Which of the op's shapes: a projection group and the like; empty if it has but one."""
    rows: int
    work: Work
    """Of a call, on average over the steps."""
    contenders: tuple[Contender, ...]
    steps: Sequence[StepInputs]
    """In turn too: all calls are made in each."""

    @property
    def working_set(self) -> int:
        """Bytes that the first contender goes through before it comes back to the same."""
        return self.work.bytes * len(self.contenders[0].calls) * len(self.steps)
