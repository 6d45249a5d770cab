"""New connections, spread evenly over the front processes.

All of them watch one listening socket. SO_REUSEPORT would spread connections by a hash, and some fronts would get twice
as many as others; here a front accepts while it holds no more than the others on average.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import socket
import ssl
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

BYTES = mmap.PAGESIZE
#: A front with more connections than the others looks away for so long. When a connection still waits after so many
#: looks, the others hang: it accepts some at each look.
_LOOK_AWAY_S = 0.002
_PATIENCE = 25
_ACCEPTED_A_TURN = 4
_BACKLOG = 2048
#: How long a handshake may take once nothing more is accepted.
_HANDSHAKE_S = 1.0
#: Without file descriptors left, accepting is tried again after it.
_EXHAUSTED_S = 0.5


class ConnectionCounts:
    """How many connections each front holds: a page of 8-byte numbers, each written by one front.

    Args:
        fd: of a memfd of BYTES bytes; stays the caller's.
    """

    def __init__(self, fd: int, fronts: int) -> None:
        self._map = mmap.mmap(fd, BYTES)
        self._counts = memoryview(self._map).cast("q")
        self._fronts = fronts

    def set(self, front: int, count: int) -> None:
        self._counts[front] = count

    def mean(self) -> float:
        return sum(self._counts[: self._fronts]) / self._fronts


class Acceptor:
    """Accepts for one front. Belongs to the event loop's thread.

    Args:
        counts: of all fronts; None for a port whose connections need not be spread.
        held: how many connections this front has now.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        connect: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext | None,
        counts: ConnectionCounts | None,
        front: int,
        held: Callable[[], int],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connect = connect
        self._context = context
        self._counts = counts
        self._front = front
        self._held = held
        self._arriving = 0  # accepted, and not yet with a protocol
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: dict[socket.socket, asyncio.TimerHandle] = {}
        self._waited: dict[socket.socket, int] = {}
        self._listeners = list(listeners)
        self._closed = False
        for listener in self._listeners:
            listener.setblocking(False)
            self._watch(listener)

    def count(self) -> int:
        """Connections, those whose TLS handshake is not over among them; also tells the other fronts."""
        count = self._held() + self._arriving
        if self._counts is not None:
            self._counts.set(self._front, count)
        return count

    def _has_its_share(self) -> bool:
        return self._counts is not None and self.count() > self._counts.mean() + 1

    def _watch(self, listener: socket.socket) -> None:
        self._timers.pop(listener, None)
        if not self._closed:
            self._loop.add_reader(listener.fileno(), self._ready, listener)

    def _look_away(self, listener: socket.socket, seconds: float) -> None:
        self._loop.remove_reader(listener.fileno())
        self._timers[listener] = self._loop.call_later(seconds, self._watch, listener)

    def _ready(self, listener: socket.socket) -> None:
        satisfied = self._has_its_share()
        if satisfied and self._waited.get(listener, 0) < _PATIENCE:
            self._waited[listener] = self._waited.get(listener, 0) + 1
            self._look_away(listener, _LOOK_AWAY_S)
            return
        for _ in range(_ACCEPTED_A_TURN):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                self._waited[listener] = 0
                return
            except OSError as error:
                logger.error("a connection cannot be accepted", extra={"error": str(error)})
                self._look_away(listener, _EXHAUSTED_S)
                return
            self._begin(connection)
            if not satisfied and self._has_its_share():
                break
        if satisfied:  # as long as the others hang; they can take some themselves in between
            self._look_away(listener, _LOOK_AWAY_S)
        else:
            self._waited[listener] = 0

    def _begin(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._arriving += 1
        task = self._loop.create_task(self._hand_over(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._connect, connection, ssl=self._context)
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:
            connection.close()
            logger.debug("a handshake failed", extra={"error": str(error)})
        finally:
            self._arriving -= 1

    async def close(self) -> None:
        """Accepts nothing more, and returns when what was accepted has its protocol, whose owner can close it then. The
        listening sockets are closed here; other fronts go on."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=_HANDSHAKE_S)
            for task in late:
                task.cancel()


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address that the host has. Raises OSError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in found:
            listener = socket.socket(family, kind, protocol)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
    except OSError:
        for listener in sockets:
            listener.close()
        raise
    return sockets
