"""The answers of a connection: in the order of their requests, and what is said where a request has none.

Predictions are answered several at once, in any order; one other request is with the application, alone. Whatever ends
the connection is decided here: what the client asked, the service's drain, a request that is not read to its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from math import inf
from typing import ClassVar, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.utils import get_remote_addr, is_ssl
from uvicorn.server import ServerState

from vernier.api.http.asgi import AsgiCycle
from vernier.api.http.body import body_timed_out, disconnected_early
from vernier.api.http.errors import answer_error
from vernier.api.http.identity import new_id
from vernier.api.http.messages import END, Piece
from vernier.errors import RequestTimeout, VernierError
from vernier.front.deadlines import TimedConnection
from vernier.front.heads import Head
from vernier.front.intake import RequestIntake
from vernier.front.limits import GRACE_S, LINGER_S, Charge, Drain, Releasable
from vernier.front.receiver import BodyReceiver
from vernier.front.request import InferenceRequest
from vernier.front.response_heads import LONG_BODY, Headers, ResponseHeads

_CLOSE = b"\r\nconnection: close"


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


class AnsweringConnection(TimedConnection):
    """What a connection writes. `vernier.front.connection` reads."""

    intake: ClassVar[RequestIntake | None] = None
    responses: ClassVar[ResponseHeads]
    drain: ClassVar[Drain]

    __slots__ = (
        "_arriving",
        "_cycle",
        "_due",
        "_fault",
        "_held",
        "_is_tls",
        "_is_told",
        "_receiver",
        "_untold",
        "_waiting",
        "access_log",
        "access_logger",
        "client",
        "server_state",
    )

    def __init__(self, server_state: ServerState, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.server_state = server_state
        self.access_logger = logging.getLogger("uvicorn.access")
        self.access_log = self.access_logger.hasHandlers()
        self._due: deque[InferenceRequest] = (
            deque()
        )  # predictions without an answer, in the order of their arrival
        self._arriving: Arriving | None = None
        self._cycle: AsgiCycle | None = None  # the request that is with the application
        self._receiver: BodyReceiver | None = None  # once there was a large body
        self._held = b""
        self._waiting = Charge(self.budget)  # for bytes that are held, and of a head that is not all there
        self._fault: VernierError | None = None  # what is said once nothing is due, before the end
        self._untold = False  # something has come that is not answered any more
        self._is_told = False  # the client knows that its last request is the last

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)  # uvloop's are none by class
        self.flow = FlowControl(transport)
        self.client = get_remote_addr(transport)
        self._is_tls = is_ssl(transport)
        self.server_state.connections.add(self)  # type: ignore[arg-type]
        self._rest()

    def data_received(self, data: bytes) -> None:
        raise NotImplementedError

    @property
    def _busy(self) -> bool:
        return bool(self._due) or self._cycle is not None

    @property
    def default_headers(self) -> Headers:
        return self.server_state.default_headers

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

    # --- out --------------------------------------------------------------------------------------
    def send_ready(self) -> None:
        """Sends every answer whose turn it is, and goes on with what waited for that."""
        due = self._due
        if self._plain and not self.drain.draining:  # most often
            while due and due[0].settled:
                self._send(due.popleft())
            if not due:
                self._idle_until = until = self.loop.time() + self.idle_s
                if self._watch_at > until:
                    self._watch_by(until)
            return
        if not self.ending and (self._leaving or self.drain.draining):
            self._end_after_this()
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
        if cycle.keep_alive and cycle.body_done:
            ends = self.ending or self._leaving or self.drain.draining or (self._eof and not self._held)
            if (
                self._fault is not None or not ends
            ):  # what is wrong with the next request is said behind this answer
                return True
        self._fault = None
        self._untold = self._untold or not cycle.body_done
        self._is_told = not cycle.message.keep_alive
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
            self._linger(LINGER_S)
        elif self._is_told:
            self._close()
        else:  # a request may be on its way
            self._linger(GRACE_S)

    def _head_is_late(self) -> None:
        if self._busy:  # what stands before it may need longer
            self._head_due += self.request_s
        else:
            allowed_s = self.request_s
            self._reject(RequestTimeout(f"the head of the request did not arrive within {allowed_s:g} s"))

    def _body_is_late(self) -> None:
        if self._cycle is not None and self.flow.read_paused:  # the application is late
            self._body_due += self.request_s
        else:
            self._break_off(body_timed_out(self.request_s))

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
