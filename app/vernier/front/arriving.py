"""A prediction between its head and the end of its body."""

from __future__ import annotations

from vernier.api.codecs import Body
from vernier.api.security import Permit
from vernier.front.heads import Head

#: Smaller pieces of a body are joined as they come, so that many of them take no more memory than the body.
_LARGE_PIECE = 32 * 1024


class Arriving:
    """A prediction whose body is not all there."""

    __slots__ = ("_pieces", "came", "due", "head", "missing", "permit")

    def __init__(self, head: Head, came: float, permit: Permit | None, due: float) -> None:
        self.head = head
        self.came = came
        self.permit = permit
        self.due = due  # when it must be complete, on the loop's clock
        self.missing = head.length
        self._pieces: list[bytes | bytearray | memoryview] = []

    def add(self, data: bytes | memoryview) -> None:
        """Takes what belongs to the body. Large pieces are kept as they are, to be copied only once."""
        self.missing -= len(data)
        pieces = self._pieces
        if len(data) >= _LARGE_PIECE:
            pieces.append(data)
        elif pieces and isinstance(last := pieces[-1], bytearray):
            last += data
        else:
            pieces.append(bytearray(data))

    def body(self) -> Body:
        """All of it."""
        return b"".join(self._pieces)
