"""The connection: finds predictions among the bytes that arrive, and sends answers in their turn.

A connection is in one of three states between segments: idle or waiting for answers, reading the body of
a prediction, or holding bytes back because something ahead of them must be finished first. Bytes go to
the parser of the ordinary path only while no answer of the fast path is due, and to the fast path only
where the ordinary parser stands between two messages and owes no response; so the two never interleave.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.server import ServerState

from vernier.api.body import body_timed_out, disconnected_early
from vernier.api.codecs import Body
from vernier.api.security import Guard, Permit
from vernier.api.service import Predictions
from vernier.border.arena import Arena
from vernier.errors import VernierError
from vernier.exposition import Metrics
from vernier.front.arriving import Arriving
from vernier.front.buffers import MOST_BEFORE, BodyBufferPool, BufferSlice
from vernier.front.heads import END, Head, Heads
from vernier.front.intake import RequestIntake
from vernier.front.receiver import LARGEST, SMALLEST, BodyReceiver
from vernier.front.request import InferenceRequest
from vernier.front.response_heads import LONG_BODY, Headers, ResponseHeads
from vernier.front.responses import ResponseWriter
from vernier.front.timeouts import TimeoutProtocol
from vernier.settings import Settings

#: Predictions of one connection that may be under way at once; what follows waits unread.
_MOST_PIPELINED = 64
#: A head that did not end by here is left to the ordinary path.
_LONGEST_HEAD = 16 * 1024
#: A head that did not end by there is refused: it would be kept in memory.
_LARGEST_HEAD = 64 * 1024
_END_BYTES = len(END)
_CLOSE = b"\r\nconnection: close"
#: Memory that is kept for large bodies: those of a few dozen connections that send images at once.
_KEPT_BYTES = 64 * 2**20


class FastProtocol(TimeoutProtocol):
    """uvicorn's protocol with a fast path. `fast_protocol` makes the class that a service uses."""

    intake: ClassVar[RequestIntake]
    heads: ClassVar[Heads]
    guard: ClassVar[Guard | None]
    responses: ClassVar[ResponseHeads]
    memory: ClassVar[BodyBufferPool]
    body_timeout_s: ClassVar[float]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._clock = self.intake.clock
        self._known_heads = self.heads.known
        self._fast = config.limit_concurrency is None and not config.root_path
        self._plain = False  # nothing is held, half read, ending or with the ordinary path
        self._between_messages = True  # where the ordinary parser stands
        self._due: deque[InferenceRequest] = (
            deque()
        )  # predictions without an answer, in the order of their arrival
        self._arriving: Arriving | None = None
        self._receiver: BodyReceiver | None = None  # once there was a large body
        self._held = b""
        self._ending = False  # once nothing is due, the connection closes
        self._in_head = False  # of a request of the ordinary path
        self._head_bytes = 0
        self._watch: asyncio.TimerHandle | None = None
        self._watch_at = inf
        self._idle_since: float | None = None  # None while the ordinary path's keep-alive timer rules

    # --- in ---------------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        if self._plain:  # most often, one whole request with a known head comes, which the rest handles too
            start = data.find(END, 0, _LONGEST_HEAD) + _END_BYTES
            block = data[:start]
            head = self._known_heads.get(block) or self.heads.find(block)
            if head is not None and len(data) == start + head.length and head.keep_alive and not self._due:
                request = InferenceRequest(self, head, data, start, self._clock())
                self._due.append(request)
                self.intake.begin(request)
                return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        if self._held:
            self._held += data
            return
        while data:
            if self._arriving is not None:
                data = self._read_body(self._arriving, data)
            elif self._ending:
                return
            else:
                data = self._next(data)

    def _next(self, data: bytes) -> bytes:
        """Takes the request at the start of `data`; returns what follows it."""
        cycle = self.cycle
        if (
            not self._fast
            or not self._between_messages
            or (cycle is not None and not cycle.response_complete)
        ):
            return self._ordinary(data)
        start = data.find(END, 0, _LONGEST_HEAD) + len(END)
        head = self.heads.find(data[:start]) if start >= len(END) else None
        if head is None:
            return self._hold(data) if self._due else self._ordinary(data)
        if self.flow.write_paused or len(self._due) >= _MOST_PIPELINED:
            return self._hold(data)
        permit: Permit | None = None
        if self.guard is None:
            self._plain = True
        else:
            try:
                permit = self.guard.admit(head.token)
            except VernierError:  # the ordinary path says it in words, and need not read the body
                return self._hold(data) if self._due else self._ordinary(data)
        came = self._clock()
        stop = start + head.length
        if len(data) < stop:
            self._plain = False
            due = self.loop.time() + self.body_timeout_s
            self._arriving = Arriving(head, came, permit, due)
            self._watch_by(due)
            if self._is_large(head):
                receiver = self._receive()
                if not receiver.active:
                    receiver.begin(head, data[:start], memoryview(data)[start:])
            elif len(data) > start:
                self._arriving.add(memoryview(data)[start:])
            return b""
        self._begin(head, data[start:stop], came, permit)
        if stop == len(data) and start <= MOST_BEFORE and self._is_large(head) and not self._ending:
            self._receive().expect(head, data[:start])
        return data[stop:]

    # --- large bodies -----------------------------------------------------------------------------
    def _is_large(self, head: Head) -> bool:
        return SMALLEST <= head.length <= LARGEST and self.scheme == "http"  # TLS has buffers of its own

    def _receive(self) -> BodyReceiver:
        if self._receiver is None:
            self._receiver = BodyReceiver(self, self.memory)
        return self._receiver

    def find_head(self, block: bytes) -> Head | None:
        return self.heads.find(block)

    def head_received(self, block: bytes) -> bool:
        """A whole head that the receiver expected; whether its body belongs to the receiver."""
        self.data_received(block)
        return self._arriving is not None

    def request_received(self, head: Head, room: BufferSlice, body: memoryview) -> bool:
        """A whole request that the receiver expected; False when it must come in parts, to be looked at."""
        if not self._plain or self._due:
            return False
        self._begin_large(head, room, body, self._clock(), None)
        return True

    def body_received(self, room: BufferSlice, body: memoryview) -> None:
        """The whole of a large body."""
        arriving, self._arriving = self._arriving, None
        if arriving is None:
            return
        self._plain = self.guard is None and not (self._held or self._ending or self.flow.write_paused)
        self._begin_large(arriving.head, room, body, arriving.came, arriving.permit)

    def _begin_large(
        self, head: Head, room: BufferSlice, body: memoryview, came: float, permit: Permit | None
    ) -> None:
        if head.envelope is None:  # a text is read more than once, and not where it lies
            self._begin(head, bytes(body), came, permit)
            return
        self._begin(head, body, came, permit, room)
        if room.is_last:
            self.intake.submit_large()

    def _read_body(self, arriving: Arriving, data: bytes) -> bytes:
        head, missing = arriving.head, arriving.missing
        if len(data) < missing:
            arriving.add(data)
            return b""
        self._arriving = None
        if missing == head.length == len(data):  # the client sent head and body one after the other
            self._begin(head, data, arriving.came, arriving.permit)
            return b""
        arriving.add(memoryview(data)[:missing])
        self._begin(head, arriving.body(), arriving.came, arriving.permit)
        return data[missing:]

    def _begin(
        self, head: Head, body: Body, came: float, permit: Permit | None, room: BufferSlice | None = None
    ) -> None:
        if not head.keep_alive:
            self._end_after_this()
        request = InferenceRequest(self, head, body, 0, came, permit, room)
        self._due.append(request)
        self.intake.begin(request)

    def _hold(self, data: bytes) -> bytes:
        """Keeps the bytes until what stands before them is done."""
        self._plain = False
        self._held = data
        self.flow.pause_reading()
        return b""

    def _release(self) -> None:
        held, self._held = self._held, b""
        self.flow.resume_reading()
        self.data_received(held)

    # --- the ordinary path ------------------------------------------------------------------------
    def _ordinary(self, data: bytes) -> bytes:
        self._plain = False
        self._idle_since = None
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > _LARGEST_HEAD:  # else it ended in here, or another began
            self.send_400_response("The head of the request is too large.")
        return b""

    def on_message_begin(self) -> None:
        self._between_messages = False
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._between_messages = True
        super().on_message_complete()

    # --- small predictions ------------------------------------------------------------------------
    @property
    def default_headers(self) -> Headers:
        return self.server_state.default_headers

    # --- out --------------------------------------------------------------------------------------
    def send_ready(self) -> None:
        """Sends every answer whose turn it is, and goes on with what waited for that."""
        due = self._due
        while due and due[0].settled:
            self._send(due.popleft())
        if self._held:
            self._release()
        elif not due and self._arriving is None:
            if self._ending:
                self.transport.close()
            else:
                self._idle_since = now = self.loop.time()
                if self._watch_at > now + self.timeout_keep_alive:
                    self._watch_by(now + self.timeout_keep_alive)

    def _send(self, request: InferenceRequest) -> None:
        message = request.message
        if message is None or self._ending:
            self._send_parts(request)
        else:  # nearly always
            self.transport.write(message)
        self.server_state.total_requests += 1
        if self.access_log:
            self._log(request.head, 200 if request.refusal is None else request.refusal.status)

    def _log(self, head: Head, status: int) -> None:
        client = ":".join(map(str, self.client or ()))
        self.access_logger.info('%s - "%s %s HTTP/%s" %d', client, "POST", head.target, "1.1", status)

    def _send_parts(self, request: InferenceRequest) -> None:
        message, payload = request.message, request.payload
        status, _, headers, _ = request.refusal or (200, b"", {}, "")
        closes = self._ending and not self._due and self._arriving is None and "connection" not in headers
        if message is not None:
            at = message.index(END)
            self.transport.write(message[:at] + _CLOSE + message[at:] if closes else message)
            return
        defaults = self.server_state.default_headers
        if closes:
            headers = {**headers, "connection": "close"}
        head = self.responses.make(defaults, status, len(payload), request.identity, headers)
        if len(payload) < LONG_BODY:
            self.transport.write(head + payload)
        else:
            self.transport.write(head)
            self.transport.write(payload)

    def _end_after_this(self) -> None:
        self._plain = False
        self._ending = True

    def pause_writing(self) -> None:
        self._plain = False
        super().pause_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._held:
            self._release()

    # --- time and end -----------------------------------------------------------------------------
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
        if self._arriving is not None:
            if now < self._arriving.due:
                self._watch_by(self._arriving.due)
            else:
                self._time_out(self._arriving)
        elif self._idle_since is not None and not self._due:
            ends = self._idle_since + self.timeout_keep_alive
            if now < ends:
                self._watch_by(ends)
            else:
                self.timeout_keep_alive_handler()

    def _time_out(self, arriving: Arriving) -> None:
        self._arriving = None
        if self._receiver is not None:
            self._receiver.stop()
        self._end_after_this()
        error = body_timed_out(self.body_timeout_s)
        self._due.append(self._refuse(arriving, error))
        self.send_ready()

    def _refuse(self, arriving: Arriving, error: VernierError) -> InferenceRequest:
        request = InferenceRequest(self, arriving.head, b"", 0, arriving.came, arriving.permit)
        self.intake.refuse(request, error)
        return request

    def shutdown(self) -> None:
        """Finishes what has begun, then closes; uvicorn waits for the connection."""
        if self._due or self._arriving is not None:
            self._end_after_this()
            self._held = b""
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._held = b""
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            self._refuse(arriving, disconnected_early())
        for request in self._due:
            self.intake.abandon(request)
        self._due.clear()
        super().connection_lost(exc)


def fast_protocol(
    predictions: Predictions, metrics: Metrics, guard: Guard, settings: Settings, arena: Arena | None = None
) -> type[FastProtocol]:
    """The class for uvicorn's `http` option.

    Args:
        arena: where large bodies are received; None for memory of this process alone.
    """

    class ServiceProtocol(FastProtocol):
        responses = ResponseHeads()
        intake = RequestIntake(predictions, ResponseWriter(metrics, responses, predictions.clock))
        heads = Heads(settings.max_body_bytes)
        memory = BodyBufferPool(_KEPT_BYTES, arena)
        body_timeout_s = head_timeout_s = settings.body_timeout_s

    ServiceProtocol.guard = None if guard.open else guard
    return ServiceProtocol
