"""How many turns of the loop it takes to let in clients that connect at once."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvicorn

from vernier.composition.operations import AcceptingServer

uvloop = pytest.importorskip("uvloop")
CLIENTS = 160


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def turns_until_all_are_in(kind: type[uvicorn.Server]) -> int:
    config = uvicorn.Config(answer, host="127.0.0.1", port=0, log_config=None, lifespan="off", loop="uvloop")
    server = kind(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    clients = [socket.create_connection(address) for _ in range(CLIENTS)]  # the kernel lets them wait
    turns = 0
    while len(server.server_state.connections) < CLIENTS:
        turns += 1
        await asyncio.sleep(0)
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    for client in clients:
        client.setblocking(False)
        got = b""
        while not got.endswith(b"ok"):
            got += await asyncio.get_running_loop().sock_recv(client, 4096)
        client.close()
    server.should_exit = True
    await serving
    with pytest.raises(OSError):
        socket.create_connection(address, timeout=5).close()
    return turns


def run(kind: type[uvicorn.Server]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(turns_until_all_are_in(kind))


def test_many_clients_are_let_in_within_a_few_turns() -> None:
    assert run(AcceptingServer) <= CLIENTS // 8


def test_without_it_each_takes_a_turn() -> None:
    """Why it is there; when this fails, libuv accepts more, and `AcceptingServer` can go."""
    assert run(uvicorn.Server) > CLIENTS // 8
