"""Receives large bodies from the kernel straight into the memory in which they stay.

While it stands in for its connection at the transport, it offers room for the rest of one body. After a large body
it goes on standing there and offers room for a head like its and a body of the same length: a client that sends such
bodies sends many. Memory is taken only when there is something to read. Whatever else comes is handed to the
connection, which then reads for itself again.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from vernier.front.buffers import MOST_BEFORE, BodyBufferPool, BufferSlice
from vernier.front.heads import Head

#: Smaller bodies gain nothing. Of larger ones more memory than has arrived would be at stake: beyond 4 MiB NumPy
#: asks for huge pages, and the first byte takes 2 MiB.
SMALLEST, LARGEST = 64 * 1024, 3 * 2**20


class ReceivingConnection(Protocol):
    """What stands behind a receiver."""

    transport: asyncio.Transport

    def find_head(self, block: bytes) -> Head | None:
        """What a whole head says; None when it is not a plain one."""
        ...

    def request_received(self, head: Head, room: BufferSlice, body: memoryview) -> bool:
        """A whole request at once; False when it must come as `head_received` and `body_received`."""
        ...

    def head_received(self, block: bytes) -> bool:
        """A whole head; whether its body is to be received and given to `body_received`."""
        ...

    def bytes_received(self, nbytes: int) -> bool:
        """More of a body whose head has been received; False when the receiver was stopped."""
        ...

    def body_received(self, room: BufferSlice, body: memoryview) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> bool | None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class BodyReceiver(asyncio.BufferedProtocol):
    """Stands in for `connection` while a large body is arriving, and until something else comes."""

    __slots__ = (
        "_again",
        "_at",
        "_block",
        "_connection",
        "_filled",
        "_head",
        "_memory",
        "_room",
        "_start",
        "active",
    )

    def __init__(self, connection: ReceivingConnection, memory: BodyBufferPool) -> None:
        self._connection = connection
        self._memory = memory
        self._head: Head | None = None  # that is expected next
        self._block = b""  # its bytes
        self._again = False  # whether it is
        self._room: BufferSlice | None = None
        self._start = 0  # where the body begins in it
        self._at = 0  # how far it is filled
        self._filled = False  # the last read filled its buffer, so the loop reads on at once, mostly in vain
        self.active = False

    def begin(self, head: Head, block: bytes, arrived: memoryview) -> None:
        """Receives the rest of a body of which `arrived` is there, then the like of it. `block`: the head's bytes."""
        self.expect(head, block)
        self._continue(arrived)

    def expect(self, head: Head, block: bytes) -> None:
        """Waits for the like of a request that has arrived."""
        self._again = head.keep_alive and len(block) <= MOST_BEFORE
        self._head = head
        self._block = block
        self._room = None
        self._at = 0
        self._filled = False
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

    def _take(self, before: int) -> BufferSlice:
        head = self._head
        assert head is not None
        self._start = before
        self._room = room = self._memory.take(before, head.length, several=head.envelope is not None)
        return room

    def _continue(self, arrived: memoryview) -> None:
        """Goes on with a body of which some has been read elsewhere."""
        view = self._take(0).view
        self._at = len(arrived)
        view[: self._at] = arrived

    # --- asyncio's side ---------------------------------------------------------------------------
    def get_buffer(self, sizehint: int) -> memoryview:
        at, room = self._at, self._room
        if room is not None and (at or not self._start):
            return room.view[at:]
        if self._filled:
            self._filled = False
            return self._memory.scratch
        # Anew if there was nothing to read last time: others may have been given what lies before that room.
        return self._take(len(self._block)).view

    def buffer_updated(self, nbytes: int) -> None:
        room, began = self._room, self._at
        if room is None:
            self._read_on(self._memory.scratch[:nbytes])
            return
        view, start = room.view, self._start
        self._at = at = began + nbytes
        is_whole = at == len(view)
        if is_whole:
            self._room, self._at, self._filled = None, 0, True
        if start and not began:
            head = self._like_the_last(view[:start]) if is_whole else None
            if head is not None and self._connection.request_received(head, room, view[start:].toreadonly()):
                return
            if not self._is_expected(view[:at]):
                return
            nbytes -= start
        if not self._connection.bytes_received(nbytes):
            return
        if is_whole:
            if not self._again:
                self.stop()
            self._connection.body_received(room, view[start:].toreadonly())

    def _read_on(self, first: memoryview) -> None:
        """What came behind a body before the loop looked elsewhere."""
        if self._is_expected(first):
            arrived = first[len(self._block) :]
            if self._connection.bytes_received(len(arrived)):
                self._continue(arrived)

    def _is_expected(self, first: memoryview) -> bool:
        """Whether the first bytes of a request begin a body that belongs in here; else they are dealt with."""
        connection, start = self._connection, len(self._block)
        block = bytes(first[:start])
        is_like = self._like_the_last(block) is not None
        if is_like and connection.head_received(block):
            return True
        rest = bytes(first[start:] if is_like else first)
        self.stop()
        if rest:
            connection.data_received(rest)
        return False

    def _like_the_last(self, block: bytes | memoryview) -> Head | None:
        """What `block` says if it is a head as long as the last one, and its body too; a trace or an id may differ."""
        last = self._head
        if block == self._block:
            return last
        head = self._connection.find_head(bytes(block)) if len(block) == len(self._block) else None
        if head is None or last is None or not head.keep_alive:
            return None
        is_alike = head.length == last.length and (head.envelope is None) == (last.envelope is None)
        return head if is_alike else None

    def eof_received(self) -> bool | None:
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._room = None
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
