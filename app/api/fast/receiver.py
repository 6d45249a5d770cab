"""Receives large bodies from the kernel straight into the memory in which they stay.

While it stands in for its connection at the transport, it offers room for the rest of one body, and a little more:
a read that does not fill its buffer spares the loop another one, and what was pipelined behind the body is handed to
the connection, which then reads for itself again. After a large body the receiver goes on standing there and offers
room for the same head and a body of the same length: a client that sends such bodies sends many. Memory is taken
only when there is something to read. Whatever else comes is handed to the connection as well.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from app.api.fast.head import Head
from app.api.fast.memory import BodyMemory

#: Smaller bodies gain nothing. Of larger ones more memory than has arrived would be at stake: beyond 4 MiB NumPy
#: asks for huge pages, and the first byte takes 2 MiB.
SMALLEST, LARGEST = 64 * 1024, 3 * 2**20
#: Longer heads are not expected again.
_LONGEST_HEAD = 4096
#: Room behind a body, enough for the next head.
_SPARE = 4096


class Connection(Protocol):
    """What stands behind a receiver."""

    transport: asyncio.Transport

    def head_received(self, block: bytes) -> bool:
        """A whole head; whether its body is to be received and given to `body_received`."""
        ...

    def body_received(self, body: memoryview) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class BodyReceiver(asyncio.BufferedProtocol):
    """Stands in for `connection` while a large body is arriving, and until something else comes."""

    __slots__ = ("_again", "_at", "_block", "_connection", "_length", "_memory", "_room", "_start", "active")

    def __init__(self, connection: Connection, memory: BodyMemory) -> None:
        self._connection = connection
        self._memory = memory
        self._block = b""  # the head that is expected next
        self._length = 0  # of its body
        self._again = False  # whether it is
        self._room: memoryview | None = None
        self._start = 0  # where the body begins in it
        self._at = 0  # how far it is filled
        self.active = False

    def begin(self, head: Head, block: bytes, arrived: memoryview) -> None:
        """Receives the rest of a body of which `arrived` is there, then the like of it. `block`: the head's bytes."""
        self.expect(head, block)
        self._start = 0
        self._at = len(arrived)
        self._room = room = self._memory.take(0, self._length + _SPARE)
        room[: self._at] = arrived

    def expect(self, head: Head, block: bytes) -> None:
        """Waits for the like of a request that has arrived."""
        self._again = head.keep_alive and len(block) <= _LONGEST_HEAD
        self._block = block
        self._length = head.length
        self._room = None
        self._at = 0
        if not self.active:
            self.active = True
            self._connection.transport.set_protocol(self)

    def stop(self) -> None:
        """Lets the connection read for itself. What has arrived of a body is forgotten."""
        self._room = None
        self._at = 0
        if self.active:
            self.active = False
            self._connection.transport.set_protocol(self._connection)  # type: ignore[arg-type]

    # --- asyncio's side ---------------------------------------------------------------------------
    def get_buffer(self, sizehint: int) -> memoryview:
        room = self._room
        if room is None:
            self._start = len(self._block)
            self._room = room = self._memory.take(self._start, self._length + _SPARE)
        return room[self._at :] if self._at else room

    def buffer_updated(self, nbytes: int) -> None:
        room, start, began = self._room, self._start, self._at
        assert room is not None
        self._at = at = began + nbytes
        if start and not began and not self._is_expected(room[:at]):
            return
        stop = start + self._length
        if at < stop:
            return
        self._room = None
        self._at = 0
        if at > stop or not self._again:
            self.stop()
        self._connection.body_received(room[start:stop].toreadonly())
        if at > stop:
            self._connection.data_received(bytes(room[stop:at]))

    def _is_expected(self, first: memoryview) -> bool:
        """Whether the first bytes of a request begin a body that belongs in here; else they are dealt with."""
        block, connection = self._block, self._connection
        head = bytes(first[: len(block)])
        if head == block and connection.head_received(block):
            return True
        rest = first[len(block) :] if head == block else first
        self.stop()
        if rest:
            connection.data_received(bytes(rest))
        return False

    def eof_received(self) -> None:
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._room = None
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
