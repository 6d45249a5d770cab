"""One kept connection: a request goes out, its answer comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httptools

from benchmarks.load.calls import Call


class Client(asyncio.Protocol):
    """A connection with one request at a time.

    Args:
        ended: called with this client, the status and the body when a request has its answer, and with status 0 when
            the connection broke before.
        lost: called when the connection is gone, after `ended`.

    Attributes:
        call, due, sent: the request under way, when it was due and when it went out, on the clock of the caller.
        is_busy: whether there is one.
        is_open: whether the connection can take one.
    """

    __slots__ = (
        "_body", "_ended", "_lost", "_parser", "_transport", "call", "due", "is_busy", "is_open", "sent", "waited"
    )  # fmt: skip

    def __init__(self, ended: Callable[[Client, int, bytes], None], lost: Callable[[Client], None]) -> None:
        self._ended = ended
        self._lost = lost
        self._body = b""
        self._transport: asyncio.Transport
        self.call: Call
        self.due = self.sent = 0.0
        self.is_busy = self.is_open = self.waited = False

    def send(self, call: Call) -> None:
        self.call = call
        self.is_busy = True
        self._transport.write(call.payload)

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()

    # --- asyncio's side ---------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._parser = httptools.HttpResponseParser(self)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self.is_busy:
            self.is_busy = False
            self._ended(self, 0, b"")
        self._lost(self)

    # --- the parser's side ------------------------------------------------------------------------
    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self.is_busy:  # an answer that nobody asked for
            self.close()
            return
        body, self._body = self._body, b""
        self.is_busy = False
        parser = self._parser
        if not parser.should_keep_alive():
            self.close()
        self._ended(self, parser.get_status_code(), body)
