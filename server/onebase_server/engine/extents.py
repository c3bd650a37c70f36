"""A best-fit allocator of contiguous extents in a flat arena, with compaction. Numbers only: it touches no memory."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Move:
    """An extent that compaction shifted down."""

    source: int
    target: int
    size: int


class Extents:
    """Which parts of `total` numbers are taken."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._taken: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"Extents(used={self.used}, free={self.free}, holes={len(self._holes())})"

    @property
    def free(self) -> int:
        """Numbers that are not taken, in whatever pieces."""
        return self.total - self.used

    def allocate(self, size: int) -> int | None:
        """The offset of a new extent in the smallest hole that holds it; None if no hole does."""
        fitting = [(length, offset) for offset, length in self._holes() if length >= size]
        if not fitting:
            return None
        _, offset = min(fitting)
        self._taken[offset] = size
        self.used += size
        return offset

    def release(self, offset: int) -> None:
        """Give the extent at `offset` back."""
        self.used -= self._taken.pop(offset)

    def compact(self) -> list[Move]:
        """Shift all extents down until no hole is between them; the moves are in ascending order, safe in turn."""
        moves, end = [], 0
        for offset, size in sorted(self._taken.items()):
            if offset != end:
                moves.append(Move(offset, end, size))
            end += size
        for move in moves:
            del self._taken[move.source]
            self._taken[move.target] = move.size
        return moves

    def _holes(self) -> list[tuple[int, int]]:
        """(offset, length) of each gap, in order."""
        edges = [(0, 0), *sorted(self._taken.items()), (self.total, 0)]
        gaps = [(offset + size, following - offset - size) for (offset, size), (following, _) in pairwise(edges)]
        return [(offset, length) for offset, length in gaps if length > 0]

    def check(self) -> None:
        """Raise AssertionError unless extents are disjoint, inside, and add up."""
        assert sum(self._taken.values()) == self.used, repr(self)
        for (offset, size), (following, _) in pairwise([*sorted(self._taken.items()), (self.total, 0)]):
            assert offset + size <= following, f"extent {offset}+{size} overlaps {following}"
