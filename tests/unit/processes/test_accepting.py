"""Connections that are accepted while a front stops accepting."""

from __future__ import annotations

import asyncio
import socket

from vernier.processes.accepting import Acceptor


async def test_what_was_accepted_has_its_protocol_when_accepting_has_ended() -> None:
    """Else nobody would close it, and the end would wait for its client."""
    connected: list[asyncio.Protocol] = []

    class Held(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connected.append(self)
            self.transport = transport

    listener = socket.create_server(("127.0.0.1", 0))
    acceptor = Acceptor([listener], Held, None, None, 0, lambda: len(connected))
    clients = [socket.create_connection(listener.getsockname()) for _ in range(3)]
    acceptor._ready(acceptor._listeners[0])
    assert (len(connected), acceptor.count()) == (0, 3)
    await acceptor.close()
    assert (len(connected), acceptor.count()) == (3, 3)
    for protocol in connected:
        protocol.transport.close()  # type: ignore[attr-defined]
    for client in clients:
        client.close()
    await asyncio.sleep(0.01)
