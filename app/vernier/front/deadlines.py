"""When a connection has waited long enough, and how it ends: one timer, a deadline for every state, and a last word.

An answer that comes before the end of its request cannot be followed by a close at once: the client, which is still
sending, would get a reset and might never see the answer. So the sending side is closed, and what still arrives is
thrown away for a while, within bounds.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import inf
from typing import ClassVar

from uvicorn.protocols.http.flow_control import FlowControl

from vernier.api.http.messages import CONTINUE, ChunkedBody, LengthBody, PartialHead
from vernier.front.limits import (
    GRACE_S,
    MAX_LINGER_BYTES,
    ByteBudget,
    Charge,
)

#: How often a client that has closed its sending side is asked whether it is still there.
_PROBE_S = 0.1
#: What is waited for bytes that have arrived and not been read.
_MOMENT_S = 0.05
_TCP_CLOSE = 7  # of linux/tcp_states.h


class TimedConnection(asyncio.Protocol):
    """Belongs to the event loop's thread. All times are on the loop's clock, in seconds.

    Attributes:
        request_s: what a client may take for a head, and for a body.
        idle_s: what it may take until its next request, and to read on in its answers.
        ending: no further request is taken, and the connection closes when nothing is due.
    """

    budget: ClassVar[ByteBudget]
    request_s: ClassVar[float]
    idle_s: ClassVar[float]

    __slots__ = (
        "__weakref__",
        "_body_due",
        "_closing",
        "_eof",
        "_framing",
        "_head_due",
        "_idle_until",
        "_leaving",
        "_linger_left",
        "_linger_until",
        "_partial",
        "_plain",
        "_probe_at",
        "_probed",
        "_unread",
        "_unread_bytes",
        "_unread_due",
        "_watch",
        "_watch_at",
        "ending",
        "flow",
        "loop",
        "transport",
    )
    transport: asyncio.Transport
    flow: FlowControl

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ending = False
        self._plain = False  # nothing is held, half read, ending or with the application
        self._leaving = False  # the service stops: the next answer is the last
        self._eof = False  # the client has closed its sending side
        self._closing = False
        self._partial: PartialHead | None = None
        self._framing: LengthBody | ChunkedBody | None = None  # of the body that is arriving
        self._head_due = self._body_due = self._linger_until = self._unread_due = self._probe_at = inf
        self._idle_until = inf
        self._linger_left = MAX_LINGER_BYTES
        self._probed = False
        self._unread: Charge | None = None  # what the client has not read of its answers
        self._watch: asyncio.TimerHandle | None = None
        self._watch_at = inf

    # --- what a connection says of itself ---------------------------------------------------------
    @property
    def _busy(self) -> bool:
        """Whether an answer is due."""
        raise NotImplementedError

    def _head_is_late(self) -> None:
        raise NotImplementedError

    def _body_is_late(self) -> None:
        raise NotImplementedError

    def _may_probe(self) -> bool:
        """Whether a "100 Continue" may be sent now."""
        raise NotImplementedError

    # --- the timer --------------------------------------------------------------------------------
    def _watch_by(self, at: float) -> None:
        """Looks after the connection at `at` or earlier. One timer for all purposes, which is seldom set anew."""
        if self._watch_at <= at:
            return
        if self._watch is not None:
            self._watch.cancel()
        self._watch_at = at
        self._watch = self.loop.call_at(at, self._look_after)

    def _look_after(self) -> None:
        self._watch, self._watch_at = None, inf
        now = self.loop.time()
        for due, act in tuple(self._deadlines()):
            if due <= now:
                act()
        self._watch_by(min((due for due, _ in self._deadlines()), default=inf))

    def _deadlines(self) -> Iterator[tuple[float, Callable[[], None]]]:
        if self._unread_due < inf:
            yield self._unread_due, self._unread_is_late
        if self._linger_until < inf:
            yield self._linger_until, self._close
        elif self._closing:
            return
        elif self._framing is not None:
            yield self._body_due, self._body_is_late
        elif self._partial is not None:
            yield self._head_due, self._head_is_late
        elif not self._busy:
            yield self._idle_until, self._idle_is_over
        if self._eof and self._busy:
            yield self._probe_at, self._probe

    def _rest(self) -> None:
        """The connection is idle from now on."""
        self._idle_until = until = self.loop.time() + self.idle_s
        if self._watch_at > until:
            self._watch_by(until)

    def _idle_is_over(self) -> None:
        if self._bytes_in_kernel(termios.FIONREAD):  # a request has come, and is read next
            self._idle_until = self.loop.time() + _MOMENT_S
        elif not self._leaving and self._bytes_in_kernel(
            termios.TIOCOUTQ
        ):  # the client does not read its answers
            self._cut_off()
        else:
            self._close()

    def _bytes_in_kernel(self, which: int) -> int:
        """FIONREAD: that have arrived and were not read; TIOCOUTQ: that were written and have not arrived."""
        found = self.transport.get_extra_info("socket")
        if found is None:
            return 0
        try:
            return int(struct.unpack("i", fcntl.ioctl(found.fileno(), which, b"\0" * 4))[0])
        except OSError:
            return 0

    # --- answers that are not read ----------------------------------------------------------------
    def pause_writing(self) -> None:
        self._plain = False
        self.flow.pause_writing()
        self._unread = self._unread or Charge(self.budget)
        self._expect_reading()

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        if self._unread is not None:
            self._unread.release()
        if not self._closing:
            self._unread_due = inf

    def _expect_reading(self) -> None:
        """The client must read on in its answers."""
        size = self.transport.get_write_buffer_size()
        if self._unread is not None:
            self._unread.set(size)
        self._unread_bytes = size
        self._unread_due = self.loop.time() + self.idle_s
        self._watch_by(self._unread_due)

    def _unread_is_late(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread_bytes:
            self._expect_reading()
        else:
            self._unread_due = inf
            self._cut_off()

    def _cut_off(self) -> None:
        """Ends the connection without waiting for the client; the system forgets what it has not read."""
        found = self.transport.get_extra_info("socket")
        if found is not None:
            with suppress(OSError):
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    # --- half-closed ------------------------------------------------------------------------------
    def _begin_probing(self) -> None:
        """A client that closed its sending side may have gone: that looks the same until something is sent to it."""
        self._probe_at = self.loop.time() + _PROBE_S
        self._watch_by(self._probe_at)

    def _probe(self) -> None:
        found = self.transport.get_extra_info("socket")
        try:
            state = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] if found is not None else 0
        except (OSError, AttributeError):  # a Unix socket, or another system
            state = 0
        if state == _TCP_CLOSE:
            self.transport.abort()
            return
        if state and not self._probed and self._may_probe():
            self._probed = True
            self.transport.write(CONTINUE)
        self._probe_at = self.loop.time() + _PROBE_S if state else inf

    # --- the end ----------------------------------------------------------------------------------
    def _linger(self, seconds: float) -> None:
        """Ends the answers, and reads on for a while; see the module."""
        if self._linger_until < inf or self._closing:
            return
        self._framing = self._partial = None
        self._linger_until = self.loop.time() + seconds
        if self._eof:
            self._close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._watch_by(self._linger_until)

    def _discard(self, data: bytes) -> None:
        """Throws away what comes behind the last request that is answered."""
        self._linger_left -= len(data)
        if self._linger_left < 0:
            if self._linger_until < inf:
                self._close()
            else:
                self.flow.pause_reading()

    def _close(self) -> None:
        """The client must read what was written, or is cut off."""
        if self._closing:
            return
        self._closing = True
        self._plain = False
        self._linger_until = inf
        if self.transport.get_write_buffer_size():
            self._expect_reading()
        self.transport.close()

    def shutdown(self) -> None:
        """The service stops. What has begun is finished, and what comes next within a moment; then it closes."""
        self._leaving = True
        self._plain = False
        if not self._busy and self._framing is None and self._partial is None:
            self._idle_until = min(self._idle_until, self.loop.time() + GRACE_S)
            self._watch_by(self._idle_until)

    def _forget(self) -> None:
        """The connection is gone."""
        self._closing = True
        self._plain = False
        if self._watch is not None:
            self._watch.cancel()
            self._watch, self._watch_at = None, -inf
        if self._unread is not None:
            self._unread.release()
        self.flow.resume_writing()
