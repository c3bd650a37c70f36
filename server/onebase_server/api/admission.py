"""How many sequences the server takes on at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from onebase_server.errors import BadRequest, Overloaded


class Admission:
    """Counts the sequences between arrival and end; beyond `capacity` it is better to say so than to wait for ever."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.in_flight = 0

    def __repr__(self) -> str:
        return f"Admission(in_flight={self.in_flight}, capacity={self.capacity})"

    @contextmanager
    def admit(self, sequences: int) -> Iterator[None]:
        """Hold places for a request's sequences.

        Raises:
            BadRequest: more than could ever be taken at one time.
            Overloaded: more than can be taken now.
        """
        if sequences > self.capacity:
            raise BadRequest(
                f"The request asks for {sequences} sequences (prompts times n), and this server takes at most "
                f"{self.capacity} at a time; send fewer in one request.",
                param="n",
            )
        if self.in_flight + sequences > self.capacity:
            raise Overloaded(
                f"The server is full: {self.in_flight} sequences are running or waiting, of at most {self.capacity}; "
                "try again in a moment."
            )
        self.in_flight += sequences
        try:
            yield
        finally:
            self.in_flight -= sequences
