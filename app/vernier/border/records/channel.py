"""The socket between two processes of the service: records, some with file descriptors, in datagrams.

What is written in one turn of the loop leaves in one datagram, so that the other side wakes up once. No send blocks:
what the socket does not take waits here, and is bounded by what the two sides owe each other.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from struct import Struct

logger = logging.getLogger(__name__)

_LENGTH = Struct("<I")
#: Bytes of records that leave together; a longer record leaves alone, up to MAX_RECORD_BYTES.
_DATAGRAM_BYTES = 48 * 1024
MAX_RECORD_BYTES = 96 * 1024
_RECEIVE_BYTES = 256 * 1024
#: The kernel's own limit.
_MAX_FDS = 253
#: Datagrams that are read in a turn before others have theirs.
_DATAGRAMS_A_TURN = 4
_SOCKET_BYTES = 4 * 2**20
#: What the kernel may run short of for a moment (descriptors that are on their way count too), and when to try again.
_SHORTAGES = (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)
_SHORTAGE_S = 0.005

OnRecord = Callable[[memoryview, list[int]], None]


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets for a Channel each."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for side in pair:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            side.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
    return pair


class Channel:
    """Belongs to the event loop's thread.

    Args:
        sock: from `socket_pair`; belongs to the channel from now on.
        on_record: gets each record, which is valid during the call, and the file descriptors that came with it, which
            are the receiver's to close.
        on_closed: called once, when the other side has gone or broke the rules, and never while `write` runs; not after
            `close`.
    """

    def __init__(self, sock: socket.socket, on_record: OnRecord, on_closed: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._on_record = on_record
        self._on_closed = on_closed
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._backlog: deque[tuple[bytes, Sequence[int]]] = deque()
        self._closed = False
        self._ended = False  # by the owner, who knows
        self._retry: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def closed(self) -> bool:
        return self._closed

    # --- out --------------------------------------------------------------------------------------
    def write(self, record: bytes, fds: Sequence[int] = ()) -> None:
        """Sends a record at the end of this turn of the loop, after those before it.

        Args:
            fds: sent along; they are closed here once they have been sent.
        """
        if self._closed:
            close_all(fds)
            return
        size = len(record)
        if fds or self._out_bytes + size > _DATAGRAM_BYTES:
            self.flush()
        if fds:
            self._send(_LENGTH.pack(size) + record, fds)
            return
        if not self._out:
            self._loop.call_soon(self.flush)
        self._out += (_LENGTH.pack(size), record)
        self._out_bytes += size

    def flush(self) -> None:
        """Sends what was written."""
        if self._out:
            datagram = b"".join(self._out)
            self._out.clear()
            self._out_bytes = 0
            self._send(datagram, ())

    def _send(self, datagram: bytes, fds: Sequence[int]) -> None:
        if self._closed:
            close_all(fds)
            return
        if self._backlog or not self._try(datagram, fds):
            if not self._backlog and self._retry is None:
                self._loop.add_writer(self._socket.fileno(), self._writable)
            self._backlog.append((datagram, fds))

    def _try(self, datagram: bytes, fds: Sequence[int]) -> bool:
        """False when it must be tried again; else it was sent, or never will be, and its descriptors are closed."""
        try:
            if fds:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                self._socket.sendmsg([datagram], [rights])
            else:
                self._socket.send(datagram)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _SHORTAGES:
                self._try_later()
                return False
            logger.debug("a channel cannot be written to", extra={"error": str(error)})
            close_all(fds)
            self._shut()
            self._loop.call_soon(self._tell_closed)  # whoever writes must not be called from within
            return True
        close_all(fds)
        return True

    def _try_later(self) -> None:
        """The socket would tell of being writable all the time."""
        self._loop.remove_writer(self._socket.fileno())
        self._retry = self._loop.call_later(_SHORTAGE_S, self._tried_later)

    def _tried_later(self) -> None:
        self._retry = None
        self._loop.add_writer(self._socket.fileno(), self._writable)
        self._writable()

    def _writable(self) -> None:
        while self._backlog:
            datagram, fds = self._backlog.popleft()
            if not self._try(datagram, fds):
                self._backlog.appendleft((datagram, fds))
                return
            if self._closed:
                return
        self._loop.remove_writer(self._socket.fileno())

    # --- in ---------------------------------------------------------------------------------------
    def _readable(self) -> None:
        for _ in range(_DATAGRAMS_A_TURN):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    _RECEIVE_BYTES, socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                data, ancillary, flags = b"", [], 0
            fds = _fds_of(ancillary) if ancillary else []
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                close_all(fds)
                self._lose()
                return
            self._take(data, fds)
            if self._closed:
                return

    def _take(self, data: bytes, fds: list[int]) -> None:
        view = memoryview(data)
        at, end = 0, len(data)
        while at < end:
            length = _LENGTH.unpack_from(data, at)[0] if end - at >= _LENGTH.size else end
            at += _LENGTH.size
            if length > end - at:
                close_all(fds)
                self._lose()
                return
            try:
                self._on_record(view[at : at + length], fds)
            except Exception as fault:  # a record that cannot be understood must not stop the others
                context = {"message": "a record between processes could not be taken", "exception": fault}
                self._loop.call_exception_handler(context)
            fds = []
            at += length
            if self._closed:
                return

    # --- end --------------------------------------------------------------------------------------
    def _lose(self) -> None:
        if not self._closed:
            self._shut()
            self._tell_closed()

    def _tell_closed(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_closed()

    def close(self) -> None:
        """Sends what can be sent at once, and ends; `on_closed` is not called."""
        self._ended = True
        if not self._closed and not self._backlog:
            self.flush()
        self._shut()

    def _shut(self) -> None:
        if self._closed:
            return
        self._closed = True
        number = self._socket.fileno()
        self._loop.remove_reader(number)
        self._loop.remove_writer(number)
        if self._retry is not None:
            self._retry.cancel()
        for _, fds in self._backlog:
            close_all(fds)
        self._backlog.clear()
        self._out.clear()
        self._socket.close()


def _fds_of(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
