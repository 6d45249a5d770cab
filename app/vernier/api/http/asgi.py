"""One request for the ASGI application: its scope, the body that it may read, and the answer that it writes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HEADER_RE, HEADER_VALUE_RE, STATUS_LINE

from vernier.api.http.messages import CONTINUE, MessageHead, Piece
from vernier.errors import VernierError

#: Bytes that wait for the application to read them, before the client is no longer read from.
_HIGH_WATER_BYTES = 64 * 1024
_FAILED = b"Internal Server Error"

logger = logging.getLogger("uvicorn.error")


Headers = Sequence[tuple[bytes, bytes]]


class MemoryCharge(Protocol):
    """What the body takes of the bytes that the process may hold."""

    def grow(self, nbytes: int) -> VernierError | None: ...

    def release(self) -> None: ...


class AsgiConnection(Protocol):
    """Where the request comes from and its answer goes."""

    transport: asyncio.Transport
    flow: FlowControl

    def answer_begins(self, cycle: AsgiCycle) -> bool:
        """Whether the connection stays open after this answer."""
        ...

    def answer_ended(self, cycle: AsgiCycle) -> None: ...

    def log_answer(self, method: str, target: str, version: str, status: int) -> None: ...

    def read_on(self) -> None: ...


def scope_of(message: MessageHead, config: Config, state: dict[str, Any], **addresses: Any) -> Scope:
    """ASGI's description of a request. `addresses`: client, server and scheme."""
    path = message.path.decode("ascii")
    return {
        "type": "http",
        "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
        "http_version": message.version,
        "method": message.method,
        "root_path": config.root_path,
        "path": config.root_path + (unquote(path) if "%" in path else path),
        "raw_path": config.root_path.encode("ascii") + message.path,
        "query_string": message.query,
        "headers": message.headers,
        "state": state.copy(),
        **addresses,
    }


class AsgiCycle:
    """Belongs to the event loop's thread.

    Attributes:
        charge: what its body takes, until it has ended.
        size: bytes of the body that have arrived.
        keep_alive: whether client and application let the connection stay open.
        body_done: whether the body has come to its end.
        started, complete: how far the answer is.
    """

    def __init__(
        self,
        connection: AsgiConnection,
        message: MessageHead,
        scope: Scope,
        charge: MemoryCharge,
        defaults: Headers,
    ) -> None:
        self.message = message
        self.charge = charge
        self.size = 0
        self.keep_alive = message.keep_alive
        self.body_done = self.started = self.complete = False
        self._connection: AsgiConnection | None = connection
        self._scope = scope
        self._defaults = defaults
        self._body = bytearray()
        self._news = asyncio.Event()
        self._continue = message.expects_continue
        self._chunked = False
        self._missing = 0  # of the answer's body

    # --- the connection's side --------------------------------------------------------------------
    def add(self, pieces: Sequence[Piece]) -> None:
        """Takes a part of the body."""
        for piece in pieces:
            self.size += len(piece)
            self._body += piece
        self._continue = False
        if len(self._body) > _HIGH_WATER_BYTES and self._connection is not None:
            self._connection.flow.pause_reading()
        self._news.set()

    def end_body(self) -> None:
        self.body_done = True
        self._continue = False
        self._news.set()

    def disconnect(self) -> None:
        """The client is gone, or has had another answer: whatever the application still writes is dropped."""
        self._connection = None
        self._body = bytearray()
        self.charge.release()
        self._news.set()

    # --- the application's side -------------------------------------------------------------------
    async def run(self, app: ASGIApp) -> None:
        """Calls the application. An answer that it leaves out is a 500; one that it breaks off ends the connection."""
        try:
            await app(self._scope, self._receive, self._send)
        except asyncio.CancelledError:
            if self._connection is not None:
                self._connection.transport.abort()
            raise
        except Exception as error:
            logger.error("Exception in ASGI application\n", exc_info=error)
        else:
            if not self.complete and self._connection is not None:
                logger.error("the application returned without a whole answer")
        if self.complete or self._connection is None:
            return
        if self.started:
            self._connection.transport.abort()
        else:
            length = str(len(_FAILED)).encode()
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", length)]
            headers.append((b"connection", b"close"))
            await self._send({"type": "http.response.start", "status": 500, "headers": headers})
            await self._send({"type": "http.response.body", "body": _FAILED})

    async def _receive(self) -> Message:
        connection = self._connection
        if connection is not None and not self.complete:
            if self._continue:
                self._continue = False
                connection.transport.write(CONTINUE)
            connection.read_on()
            await self._news.wait()
            self._news.clear()
        if self._connection is None or self.complete:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": not self.body_done}

    async def _send(self, message: Message) -> None:
        connection = self._connection
        if connection is not None and connection.flow.write_paused:
            await connection.flow.drain()
            connection = self._connection
        if connection is None:
            return
        kind = message["type"]
        if not self.started and kind == "http.response.start":
            self._start(connection, message)
        elif self.started and not self.complete and kind == "http.response.body":
            self._write_body(connection, message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"the ASGI message '{kind}' does not belong here")

    def _start(self, connection: AsgiConnection, message: Message) -> None:
        status: int = message["status"]
        headers = [(name.lower(), value) for name, value in [*self._defaults, *message.get("headers", ())]]
        for name, value in headers:
            if HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
                raise RuntimeError(f"the application's header {name!r} is not one")
        self.started = True
        self._continue = False
        known = dict(headers)
        if b"close" in [token.strip() for token in known.get(b"connection", b"").lower().split(b",")]:
            self.keep_alive = False
        headers = [header for header in headers if header[0] != b"connection"]
        if not connection.answer_begins(self):
            headers.append((b"connection", b"close"))
        if b"content-length" in known:
            self._missing = int(known[b"content-length"])
        elif known.get(b"transfer-encoding", b"").lower() == b"chunked":
            self._chunked = True
        elif self.message.method != "HEAD" and status not in (204, 304):
            self._chunked = True
            headers.append((b"transfer-encoding", b"chunked"))
        target = self.message.target.decode("latin-1")
        connection.log_answer(self.message.method, target, self.message.version, status)
        lines = [b"%b: %b\r\n" % header for header in headers]
        connection.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n")))

    def _write_body(self, connection: AsgiConnection, body: bytes, more: bool) -> None:
        write = connection.transport.write
        if self.message.method == "HEAD":
            self._missing = 0
        elif self._chunked:
            parts = [b"%x\r\n" % len(body), body, b"\r\n"] if body else []
            write(b"".join(parts if more else [*parts, b"0\r\n\r\n"]))
        else:
            if len(body) > self._missing:
                raise RuntimeError("the answer is longer than its Content-Length")
            self._missing -= len(body)
            write(body)
        if not more:
            if self._missing:
                raise RuntimeError("the answer is shorter than its Content-Length")
            self.complete = True
            self.charge.release()
            self._news.set()
            connection.answer_ended(self)
