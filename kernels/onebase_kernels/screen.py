"""What finds the best tokens of an output head with less reading than all of it."""

from typing import Protocol


class HeadScreen(Protocol):
    """Bounds of every token's logit, as one back end reads them beside the head; others cannot."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the head."""
