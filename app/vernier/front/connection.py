"""The connection: one place that counts bytes, time and state for everything that arrives, whatever it is for.

Between segments a connection is idle, has the beginning of a head or of a body, or holds bytes back because answers
ahead of them are due. Predictions go to the intake, several at once; any other request goes to the ASGI application
alone, when no answer is due; answers leave in the order of their requests. `vernier.front.deadlines` says how long each
state may last and how a connection ends.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from math import inf
from typing import Any, ClassVar

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr
from uvicorn.server import ServerState

from vernier.api.auth.security import Guard
from vernier.api.formats.codecs import LONG_BYTES, Body
from vernier.api.http.asgi import AsgiCycle, scope_of
from vernier.api.http.body import too_large
from vernier.api.http.messages import (
    CONTINUE,
    END,
    MAX_HEAD_BYTES,
    ChunkedBody,
    LengthBody,
    MessageHead,
    PartialHead,
    read_head,
)
from vernier.api.service import Predictions
from vernier.border.memory.arena import Arena
from vernier.errors import RequestError, VernierError
from vernier.exposition import Metrics
from vernier.front.answering import AnsweringConnection, Arriving
from vernier.front.buffers import MOST_BEFORE, BodyBufferPool, BufferSlice
from vernier.front.heads import Head, Heads, prediction_head
from vernier.front.intake import RequestIntake
from vernier.front.limits import (
    MAX_PIPELINED,
    MAX_PIPELINED_BYTES,
    UNCOUNTED_BYTES,
    ByteBudget,
    Charge,
    Drain,
    Releasable,
    byte_budget,
)
from vernier.front.receiver import LARGEST, SMALLEST, BodyReceiver
from vernier.front.request import InferenceRequest
from vernier.front.response_heads import ResponseHeads
from vernier.front.responses import ResponseWriter
from vernier.settings import Settings

#: Where the quick look for the end of a head ends.
_QUICK_HEAD_BYTES = 16 * 1024
_END_BYTES = len(END)
#: Memory that is kept for large bodies: those of a few dozen connections that send images at once.
_KEPT_BYTES = 64 * 2**20
#: The application, which reads with a limit of its own, is first to say that a body is late.
_APPLICATION_S = 1.0


class Connection(AnsweringConnection):
    """uvicorn's `http` class for all ports. `service_protocol` and `plain_protocol` make the classes that are used."""

    heads: ClassVar[Heads]
    guard: ClassVar[Guard | None] = None
    memory: ClassVar[BodyBufferPool]
    max_body_bytes: ClassVar[int]

    __slots__ = ("_app_state", "_begin_small", "_clock", "_config", "_known_heads")

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(server_state, _loop or asyncio.get_event_loop())
        if not config.loaded:
            config.load()
        self._config = config
        self._app_state = app_state
        self._known_heads = self.heads.known
        if self.intake is not None:
            self._clock, self._begin_small = self.intake.clock, self.intake.begin

    @property
    def _may_be_plain(self) -> bool:
        return self.guard is None and not (self.ending or self._leaving or self._eof)

    # --- in ---------------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        if self._plain:  # most often, one whole request with a known head comes, which the rest handles too
            start = data.find(END, 0, _QUICK_HEAD_BYTES) + _END_BYTES
            block = data[:start]
            head = self._known_heads.get(block) or self.heads.find(block)
            if (
                head is not None
                and len(data) == start + head.length
                and head.length <= UNCOUNTED_BYTES
                and head.keep_alive
                and not self._due
            ):
                request = InferenceRequest(self, head, data, start, self._clock())
                self._due.append(request)
                self._begin_small(request)
                return
        if self._held:
            self._held += data
            self._waiting.set(len(self._held))
            return
        while data:
            if self._framing is not None:
                data = self._read_body(data)
            elif self.ending:
                self._untold = True
                self._discard(data)
                return
            else:
                data = self._read_head(data)

    def _read_head(self, data: bytes) -> bytes:
        """Takes the request at the start of `data`, or goes on with its head; returns what follows."""
        partial = self._partial
        try:
            if partial is None or not len(partial):
                rest = data.lstrip(b"\r\n")
                if len(rest) < len(data):
                    partial = self._begin_head()
                    partial.skip(len(data) - len(rest))
                    if not rest:
                        return b""
                    data = rest
            if (partial is not None and len(partial)) or data.find(END, 0, MAX_HEAD_BYTES) < 0:
                partial = partial or self._begin_head()
                whole = partial.add(data)
                self._waiting.set(len(partial))
                if whole is None:
                    return b""
                data = whole
        except RequestError as error:
            return self._reject(error)
        self._partial, self._head_due = None, inf
        self._waiting.set(0)
        return self._read_request(data, data.index(END) + _END_BYTES)

    def _begin_head(self) -> PartialHead:
        if self._partial is None:
            self._plain = False
            self._partial = PartialHead()
            self._head_due = self.loop.time() + self.request_s
            self._watch_by(self._head_due)
        return self._partial

    def _read_request(self, data: bytes, start: int) -> bytes:
        """Takes the request whose head is `data[:start]`; returns what follows it."""
        if self.flow.write_paused or self._cycle is not None:
            return self._hold(data)
        block = data[:start]
        head = self.heads.find(block) if self.intake is not None else None
        if head is not None:
            return self._read_prediction(head, head.length, False, data, start)
        try:
            message = read_head(block)
        except RequestError as error:
            return self._reject(error)
        if self.intake is not None:
            head = prediction_head(message)
            if head is not None:
                return self._read_prediction(head, message.length, message.expects_continue, data, start)
        return self._hold(data) if self._due else self._read_other(message, data[start:])

    def _read_prediction(
        self, head: Head, length: int | None, expects_continue: bool, data: bytes, start: int
    ) -> bytes:
        due, stop = self._due, start + (length or 0)
        is_whole = length is not None and len(data) >= stop
        if due and (expects_continue or len(due) >= MAX_PIPELINED or self._is_much(head.length)):
            return self._hold(data)
        came = self._clock()
        permit: Releasable | None = None
        try:
            if self.guard is not None:
                permit = self.guard.admit(head.token)
            if head.length > self.max_body_bytes:
                raise too_large(self.max_body_bytes)
            if head.length > UNCOUNTED_BYTES or not is_whole:
                permit = charge = Charge(self.budget, permit)
                refusal = charge.grow(head.length) if is_whole else None
                if not is_whole and head.length > UNCOUNTED_BYTES:
                    refusal = self.budget.refusal(head.length)
                if refusal is not None:
                    raise refusal
        except VernierError as error:
            self._refuse(head, came, permit, error, is_whole)
            return data[stop:] if is_whole else b""
        if is_whole:
            self._plain = self._may_be_plain
            self._begin(head, data[start:stop], came, permit)
            if stop == len(data) and start <= MOST_BEFORE and self._is_large(head) and not self.ending:
                self._receive().expect(head, data[:start])
            return data[stop:]
        self._plain = False
        self._arriving = Arriving(head, came, charge)
        self._begin_body(length, self.request_s)
        if expects_continue and len(data) == start:
            self.transport.write(CONTINUE)
        if length is not None and self._is_large(head):
            receiver = self._receive()
            if not receiver.active:
                charge.grow(len(data) - start)
                receiver.begin(head, data[:start], memoryview(data)[start:])
            return b""
        return data[start:]

    def _is_much(self, length: int) -> bool:
        """Whether a body of this size has to wait until some of those before it are answered."""
        if length <= UNCOUNTED_BYTES:
            return False
        return sum([request.head.length for request in self._due]) + length > MAX_PIPELINED_BYTES

    def _read_other(self, message: MessageHead, rest: bytes) -> bytes:
        """Has the application answer; returns what is left of `rest`, which follows the head."""
        self._plain = False
        app: ASGIApp = self._config.loaded_app
        addresses = {
            "client": self.client,
            "server": get_local_addr(self.transport),
            "scheme": "https" if self._is_tls else "http",
        }
        scope = scope_of(message, self._config, self._app_state, **addresses)
        self._cycle = cycle = AsgiCycle(self, message, scope, Charge(self.budget), self.default_headers)
        if message.length == 0:
            cycle.end_body()
        else:
            self._begin_body(message.length, self.request_s + _APPLICATION_S)
        task = self.loop.create_task(cycle.run(app))
        task.add_done_callback(self.server_state.tasks.discard)
        self.server_state.tasks.add(task)
        return rest

    def _begin_body(self, length: int | None, allowed_s: float) -> None:
        self._framing = ChunkedBody() if length is None else LengthBody(length)
        self._body_due = self.loop.time() + allowed_s
        self._watch_by(self._body_due)

    def _read_body(self, data: bytes) -> bytes:
        """Takes what of `data` belongs to the body that is arriving; returns what follows it."""
        framing, arriving = self._framing, self._arriving
        taker = arriving or self._cycle
        assert framing is not None
        assert taker is not None
        error: VernierError | None
        try:
            pieces, rest = framing.feed(data)
        except RequestError as fault:
            return self._break_off(fault)
        nbytes = sum(map(len, pieces))
        if taker.size + nbytes > self.max_body_bytes:
            error = too_large(self.max_body_bytes)
        else:
            error = taker.charge.grow(nbytes)
        if error is not None:
            return self._break_off(error)
        taker.add(pieces)
        if framing.done:
            self._framing, self._body_due = None, inf
            if isinstance(taker, AsgiCycle):
                taker.end_body()
            else:
                self._arriving = None
                self._end_arriving(taker)
        return rest

    def _end_arriving(self, arriving: Arriving) -> None:
        head, body = arriving.head, arriving.body
        if isinstance(body, bytearray) and len(body) <= LONG_BYTES:
            body = bytes(body)
        if head.length != len(body):  # it came in chunks
            head = replace(head, length=len(body))
        self._begin(head, body, arriving.came, arriving.charge)

    def _begin(
        self,
        head: Head,
        body: Body,
        came: float,
        permit: Releasable | None,
        buffer: BufferSlice | None = None,
    ) -> None:
        intake = self.intake
        assert intake is not None
        if not head.keep_alive:
            self._is_told = True
            self._end_after_this()
        request = InferenceRequest(self, head, body, 0, came, permit, buffer)
        self._due.append(request)
        if head.is_long(len(body)):
            intake.begin_long(request)
        else:
            intake.begin(request)

    # --- large bodies -----------------------------------------------------------------------------
    def _is_large(self, head: Head) -> bool:
        return SMALLEST <= head.length <= LARGEST and not self._is_tls  # TLS has buffers of its own

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

    def bytes_received(self, nbytes: int) -> bool:
        """More of a body that the receiver takes; False when it shall not go on."""
        arriving = self._arriving
        error = arriving.charge.grow(nbytes) if arriving is not None else None
        if error is not None:
            self._break_off(error)
        return error is None

    def request_received(self, head: Head, room: BufferSlice, body: memoryview) -> bool:
        """A whole request that the receiver expected; False when it must come in parts, to be looked at."""
        if not self._plain or self._due:
            return False
        charge = Charge(self.budget)
        if charge.grow(len(body)) is not None:
            return False
        self._begin_large(head, room, body, self._clock(), charge)
        return True

    def body_received(self, room: BufferSlice, body: memoryview) -> None:
        """The whole of a large body."""
        arriving, self._arriving = self._arriving, None
        self._framing, self._body_due = None, inf
        if arriving is not None:
            self._plain = self._may_be_plain and not (self._held or self.flow.write_paused)
            self._begin_large(arriving.head, room, body, arriving.came, arriving.charge)

    def _begin_large(
        self, head: Head, room: BufferSlice, body: memoryview, came: float, charge: Charge
    ) -> None:
        assert self.intake is not None
        if head.envelope is None:  # a text is read more than once, and not where it lies
            self._begin(head, bytes(body), came, charge)
            return
        self._begin(head, body, came, charge, room)
        if room.is_last:
            self.intake.submit_large()


def service_protocol(
    predictions: Predictions,
    metrics: Metrics,
    guard: Guard,
    settings: Settings,
    drain: Drain,
    budget: ByteBudget | None = None,
    arena: Arena | None = None,
) -> type[Connection]:
    """The class for uvicorn's `http` option on the port of predictions.

    Args:
        budget: that other ports share, if any. arena: where large bodies are received, if anywhere but here.
    """

    class ServiceConnection(plain_protocol(settings, drain, budget)):  # type: ignore[misc]
        __slots__ = ()
        responses = ResponseHeads()
        intake = RequestIntake(predictions, ResponseWriter(metrics, responses, predictions.clock))
        memory = BodyBufferPool(_KEPT_BYTES, arena)

    ServiceConnection.guard = None if guard.open else guard
    return ServiceConnection


def plain_protocol(settings: Settings, drain: Drain, budget: ByteBudget | None = None) -> type[Connection]:
    """The same for a port without predictions: all requests go to the application."""

    class PlainConnection(Connection):
        __slots__ = ()
        heads = Heads(settings.max_body_bytes)
        responses = ResponseHeads()
        request_s = settings.body_timeout_s
        idle_s = settings.keep_alive_timeout_s
        max_body_bytes = settings.max_body_bytes

    PlainConnection.drain = drain
    PlainConnection.budget = budget or byte_budget(settings)
    return PlainConnection
