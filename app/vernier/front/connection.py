"""The connection: one place that counts bytes, time and state for everything that arrives, whatever it is for.

Between segments a connection is idle, has the beginning of a head or of a body, or holds bytes back because answers
ahead of them are due. Predictions go to the intake, several at once; any other request goes to the ASGI application
alone, when no answer is due; answers leave in the order of their requests. `vernier.front.deadlines` says how long each
state may last and how a connection ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any, ClassVar, cast

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from vernier.api.body import body_timed_out, disconnected_early, too_large
from vernier.api.codecs import LONG_BYTES, Body
from vernier.api.errors import answer_error
from vernier.api.identity import new_id
from vernier.api.security import Guard
from vernier.api.service import Predictions
from vernier.errors import RequestError, RequestTimeout, VernierError
from vernier.exposition import Metrics
from vernier.front.asgi import AsgiCycle, scope_of
from vernier.front.buffers import MOST_BEFORE, BodyBufferPool, BufferSlice
from vernier.front.deadlines import TimedConnection
from vernier.front.heads import Head, Heads, prediction_head
from vernier.front.intake import RequestIntake
from vernier.front.limits import (
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
    MAX_PIPELINED_BYTES,
    UNCOUNTED_BYTES,
    ByteBudget,
    Charge,
    Drain,
    Releasable,
    Times,
    byte_budget,
)
from vernier.front.messages import (
    CONTINUE,
    END,
    ChunkedBody,
    LengthBody,
    MessageHead,
    PartialHead,
    Piece,
    read_head,
)
from vernier.front.receiver import LARGEST, SMALLEST, BodyReceiver
from vernier.front.request import InferenceRequest
from vernier.front.response_heads import LONG_BODY, Headers, ResponseHeads
from vernier.front.responses import ResponseWriter
from vernier.settings import Settings

#: Where the quick look for the end of a head ends.
_QUICK_HEAD_BYTES = 16 * 1024
_END_BYTES = len(END)
_CLOSE = b"\r\nconnection: close"
#: Memory that is kept for large bodies: those of a few dozen connections that send images at once.
_KEPT_BYTES = 64 * 2**20
#: The application, which reads with a limit of its own, is first to say that a body is late.
_APPLICATION_S = 1.0


class Arriving:
    """A prediction whose body is not all there."""

    __slots__ = ("body", "came", "charge", "head")

    def __init__(self, head: Head, came: float, charge: Charge) -> None:
        self.head = head
        self.came = came
        self.charge = charge
        self.body: bytes | bytearray = b""

    @property
    def size(self) -> int:
        return len(self.body)

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if not self.body and isinstance(piece, bytes):  # often the whole of it
                self.body = piece
                continue
            if isinstance(self.body, bytes):
                self.body = bytearray(self.body)
            self.body += piece


class Connection(TimedConnection):
    """uvicorn's `http` class for all ports. `service_protocol` and `plain_protocol` make the classes that are used."""

    intake: ClassVar[RequestIntake | None] = None
    heads: ClassVar[Heads]
    guard: ClassVar[Guard | None] = None
    responses: ClassVar[ResponseHeads]
    memory: ClassVar[BodyBufferPool]
    drain: ClassVar[Drain]
    max_body_bytes: ClassVar[int]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(_loop or asyncio.get_event_loop())
        if not config.loaded:
            config.load()
        self.server_state = server_state
        self.access_logger = logging.getLogger("uvicorn.access")
        self.access_log = self.access_logger.hasHandlers()
        self._config = config
        self._app_state = app_state
        self._known_heads = self.heads.known
        if self.intake is not None:
            self._clock, self._begin_small = self.intake.clock, self.intake.begin
        self._due: deque[InferenceRequest] = (
            deque()
        )  # predictions without an answer, in the order of their arrival
        self._arriving: Arriving | None = None
        self._cycle: AsgiCycle | None = None
        self._receiver: BodyReceiver | None = None  # once there was a large body
        self._held = b""
        self._waiting = Charge(self.budget)  # for bytes that are held, and of a head that is not all there
        self._fault: VernierError | None = None  # what is said once nothing is due, before the end
        self._untold = False  # something has come that is not answered any more

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)  # uvloop's are none by class
        self.flow = FlowControl(transport)
        self.client = get_remote_addr(transport)
        self._is_tls = is_ssl(transport)
        self.server_state.connections.add(self)  # type: ignore[arg-type]
        self._rest()

    @property
    def _busy(self) -> bool:
        return bool(self._due) or self._cycle is not None

    @property
    def _may_be_plain(self) -> bool:
        return self.guard is None and not (self.ending or self._leaving or self._eof)

    @property
    def default_headers(self) -> Headers:
        return self.server_state.default_headers

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
            self._head_due = self.loop.time() + self.times.request_s
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
                refusal = charge.grow(head.length) if is_whole else self.budget.refusal(head.length)
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
        self._begin_body(length, self.times.request_s)
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
            self._begin_body(message.length, self.times.request_s + _APPLICATION_S)
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
            self._end_after_this()
        request = InferenceRequest(self, head, body, 0, came, permit, buffer)
        self._due.append(request)
        if head.envelope is None and len(body) > LONG_BYTES:
            intake.begin_long(request)
        else:
            intake.begin(request)

    def _hold(self, data: bytes) -> bytes:
        """Keeps the bytes until what stands before them is done."""
        self._plain = False
        self._held = data
        self._waiting.set(len(data))
        self.flow.pause_reading()
        return b""

    def _release(self) -> None:
        held, self._held = self._held, b""
        self._waiting.set(0)
        self.flow.resume_reading()
        self.data_received(held)

    def read_on(self) -> None:
        """The application has use for what the client sends."""
        if not self._held:
            self.flow.resume_reading()

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

    # --- out --------------------------------------------------------------------------------------
    def send_ready(self) -> None:
        """Sends every answer whose turn it is, and goes on with what waited for that."""
        if not self.ending and (self._leaving or self.drain.draining):
            self._end_after_this()
        due = self._due
        while due and due[0].settled:
            self._send(due.popleft())
        self._go_on()

    def _go_on(self) -> None:
        if self._held:
            if not self.flow.write_paused:
                self._release()
        elif not self._due and self._framing is None and self._cycle is None:
            if self.ending or self._eof:
                self._finish()
            else:
                self._rest()

    def _send(self, request: InferenceRequest) -> None:
        message = request.message
        if message is None or self.ending or self._eof:
            self._send_parts(request)
        else:  # nearly always
            self.transport.write(message)
        self.server_state.total_requests += 1
        if self.access_log:
            head, refusal = request.head, request.refusal
            self.log_answer("POST", head.target, head.version, 200 if refusal is None else refusal.status)

    def _send_parts(self, request: InferenceRequest) -> None:
        message, payload = request.message, request.payload
        status, _, headers, _ = request.refusal or (200, b"", {}, "")
        closes = self._is_last and "connection" not in headers
        if message is not None:
            at = message.index(END)
            self.transport.write(message[:at] + _CLOSE + message[at:] if closes else message)
            return
        if closes:
            headers = {**headers, "connection": "close"}
        head = self.responses.make(self.default_headers, status, len(payload), request.identity, headers)
        if len(payload) < LONG_BODY:
            self.transport.write(head + payload)
        else:
            self.transport.write(head)
            self.transport.write(payload)

    @property
    def _is_last(self) -> bool:
        """Whether the answer that is sent now is the last one."""
        nothing_follows = not (self._due or self._arriving or self._held or self._fault)
        return (self.ending or self._eof) and nothing_follows

    def answer_begins(self, cycle: AsgiCycle) -> bool:
        """Whether the connection stays open after the application's answer."""
        if cycle.message.keep_alive and cycle.body_done and not self.ending:
            ends = self._leaving or self.drain.draining or (self._eof and not self._held)
            if not ends:
                return True
        self._untold = self._untold or not cycle.body_done
        self._end_after_this()
        return False

    def answer_ended(self, cycle: AsgiCycle) -> None:
        self.server_state.total_requests += 1
        self._cycle = self._framing = None
        self.read_on()
        self._go_on()

    def log_answer(self, method: str, target: str, version: str, status: int) -> None:
        if self.access_log:
            client = ":".join(map(str, self.client or ()))
            self.access_logger.info('%s - "%s %s HTTP/%s" %d', client, method, target, version, status)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._held:
            self._go_on()

    # --- what is not answered as it was meant -----------------------------------------------------
    def _refuse(
        self, head: Head, came: float, permit: Releasable | None, error: VernierError, is_whole: bool
    ) -> None:
        """Answers a prediction that is not read. `is_whole`: its body is here, so that the next may follow."""
        request = self._refused(head, came, permit, error)
        self._due.append(request)
        self._untold = self._untold or not is_whole
        refusal = request.refusal
        if not is_whole or not head.keep_alive or (refusal is not None and "connection" in refusal.headers):
            self._end_after_this()
        self.send_ready()

    def _refused(
        self, head: Head, came: float, permit: Releasable | None, error: VernierError
    ) -> InferenceRequest:
        assert self.intake is not None
        request = InferenceRequest(self, head, b"", 0, came, permit)
        self.intake.refuse(request, error)
        return request

    def _break_off(self, error: VernierError) -> bytes:
        """Answers a request whose body is late, too long or no body; what follows is not read."""
        arriving, self._arriving = self._arriving, None
        cycle = self._cycle
        self._framing, self._body_due = None, inf
        if self._receiver is not None:
            self._receiver.stop()
        self._untold = True
        self._end_after_this()
        if arriving is not None:
            self._due.append(self._refused(arriving.head, arriving.came, arriving.charge, error))
            self.send_ready()
        elif cycle is not None and not cycle.started:
            cycle.disconnect()
            self._cycle = None
            self._reject(error)
        else:
            self.transport.abort()
        return b""

    def _reject(self, error: VernierError) -> bytes:
        """Answers what is no request, when nothing else is due; what follows is not read."""
        self._fault = error
        self._untold = True
        self._partial, self._head_due = None, inf
        self._waiting.set(0)
        self._end_after_this()
        self._go_on()
        return b""

    def _end_after_this(self) -> None:
        self._plain = False
        self.ending = True
        if self._held:
            self._held = b""
            self._waiting.set(0)
            self._untold = True

    def _finish(self) -> None:
        """Nothing is due any more, and nothing further is answered."""
        error, self._fault = self._fault, None
        if error is not None and not self._closing:
            status, body, headers, _ = answer_error(error)
            headers = {**headers, "connection": "close"}
            head = self.responses.make(self.default_headers, status, len(body), new_id(), headers)
            self.transport.write(head + body)
        if self._untold or self.flow.read_paused:
            self._linger()
        else:
            self._close()

    def _head_is_late(self) -> None:
        if self._busy:  # what stands before it may need longer
            self._head_due += self.times.request_s
        else:
            allowed_s = self.times.request_s
            self._reject(RequestTimeout(f"the head of the request did not arrive within {allowed_s:g} s"))

    def _body_is_late(self) -> None:
        if self._cycle is not None and self.flow.read_paused:  # the application is late
            self._body_due += self.times.request_s
        else:
            self._break_off(body_timed_out(self.times.request_s))

    def _may_probe(self) -> bool:
        if self.transport.get_write_buffer_size():
            return False
        if self._cycle is not None:
            return not self._cycle.started and self._cycle.message.version == "1.1"
        return bool(self._due) and self._due[0].head.version == "1.1"

    # --- the client's end -------------------------------------------------------------------------
    def eof_received(self) -> bool:
        """What came whole is answered still; a request that did not will never be whole."""
        self._eof = True
        self._plain = False
        self._partial, self._head_due = None, inf
        self._drop_arriving()
        is_cut = self._cycle is not None and self._framing is not None
        if self._is_tls or is_cut or not (self._busy or self._held):
            self._close()
            return not self._is_tls
        self._begin_probing()
        return True

    def _drop_arriving(self) -> None:
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            self._framing, self._body_due = None, inf
            self._refused(arriving.head, arriving.came, arriving.charge, disconnected_early())

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(self)
        self._held = b""
        self._waiting.release()
        self._drop_arriving()
        for request in self._due:
            assert self.intake is not None
            self.intake.abandon(request)
        self._due.clear()
        if self._cycle is not None:
            self._cycle.disconnect()
        self._forget()


def service_protocol(
    predictions: Predictions,
    metrics: Metrics,
    guard: Guard,
    settings: Settings,
    drain: Drain,
    budget: ByteBudget | None = None,
) -> type[Connection]:
    """The class for uvicorn's `http` option on the port of predictions.

    Args:
        drain: says when the service begins to shut down.
        budget: of the whole process, when other ports share it.
    """

    class ServiceConnection(plain_protocol(settings, drain, budget)):  # type: ignore[misc]
        responses = ResponseHeads()
        intake = RequestIntake(predictions, ResponseWriter(metrics, responses, predictions.clock))
        memory = BodyBufferPool(_KEPT_BYTES)

    ServiceConnection.guard = None if guard.open else guard
    return ServiceConnection


def plain_protocol(settings: Settings, drain: Drain, budget: ByteBudget | None = None) -> type[Connection]:
    """The same for a port without predictions: all requests go to the application."""

    class PlainConnection(Connection):
        heads = Heads(settings.max_body_bytes)
        responses = ResponseHeads()
        times = Times(settings.body_timeout_s, settings.keep_alive_timeout_s)
        max_body_bytes = settings.max_body_bytes

    PlainConnection.drain = drain
    PlainConnection.budget = budget or byte_budget(settings)
    return PlainConnection
