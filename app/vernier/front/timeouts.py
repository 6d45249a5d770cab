"""Clients that open a connection and say nothing, or say it one byte at a time.

uvicorn ends a connection that idles after an answer, and waits for ever for the first request and for the rest
of a head. Here a connection that says nothing is closed after the keep-alive timeout, and a head that has
begun must be complete within the time that a body has.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vernier.api.errors import answer_error
from vernier.errors import RequestTimeout


class TimeoutProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a limit on the time that the head of a request takes."""

    head_timeout_s: ClassVar[float]

    _awaiting_head = True
    _begun = False
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn cancels this timer when something arrives, and sets it again after an answer
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._awaiting_head and self._head_timer is None and (self._begun or not self._answering):
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def on_message_begin(self) -> None:
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._awaiting_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._awaiting_head, self._begun = True, False
        super().on_message_complete()

    def shutdown(self) -> None:
        super().shutdown()
        if self._answering and not self.cycle.response_started:  # uvicorn says this itself from 0.54 on only
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._answering:  # what stands before it may need longer; then the rest is looked for again
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)
            return
        status, body, headers, _ = answer_error(
            RequestTimeout(f"the head of the request did not arrive within {self.head_timeout_s:g} s")
        )
        lines = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        head = f"HTTP/1.1 {status} Request Timeout\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        self.transport.write(head.encode() + b"\r\n" + body)
        self.transport.close()


def timeout_protocol(timeout_s: float) -> type[TimeoutProtocol]:
    """The class for uvicorn's `http` option: heads must be complete within `timeout_s`."""

    class ServiceProtocol(TimeoutProtocol):
        head_timeout_s = timeout_s

    return ServiceProtocol
