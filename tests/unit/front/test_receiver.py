"""The receiver on real connections of both event loops: what it takes in place, and what it holds meanwhile."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable

import numpy as np
import pytest
import uvloop

from vernier.api.formats.codecs import PredictRequest
from vernier.front.buffers import ALIGNMENT, BodyBufferPool, BufferSlice
from vernier.front.heads import Head
from vernier.front.receiver import BodyReceiver

SIZE = 300_000
BLOCK = b"POST /x HTTP/1.1\r\n\r\n"
HEAD = Head("/x", SIZE, True, None, None, None)
TRACED_BLOCK = b"POST /y HTTP/1.1\r\n\r\n"  # as long as the other
TRACED = Head("/y", SIZE, True, None, "trace", None)


class Connection(asyncio.Protocol):
    """Has its receiver wait for HEAD from the beginning, and notes what it is given."""

    def __init__(self, memory: BodyBufferPool) -> None:
        self.receiver = BodyReceiver(self, memory)
        self.seen: list[str | bytes] = []
        self.heads: list[Head] = []
        self.bodies: list[memoryview] = []
        self.accepts = True
        self.received = 0  # bytes of bodies whose head was handed on
        self.whole = False  # whether requests are taken whole
        self.something = asyncio.Event()

    def _note(self, what: str | bytes) -> None:
        self.seen.append(what)
        self.something.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.receiver.expect(HEAD, BLOCK)

    def find_head(self, block: bytes) -> Head | None:
        return TRACED if block == TRACED_BLOCK else None

    def request_received(self, head: Head, room: BufferSlice, body: memoryview) -> bool:
        assert head.length == SIZE
        self.heads.append(head)
        if self.whole:
            self.bodies.append(body)
            self._note("body")
        return self.whole

    def head_received(self, block: bytes) -> bool:
        assert block in (BLOCK, TRACED_BLOCK)
        self._note("head")
        return self.accepts

    def bytes_received(self, nbytes: int) -> bool:
        self.received += nbytes
        return True

    def body_received(self, room: BufferSlice, body: memoryview) -> None:
        self.bodies.append(body)
        self._note("body")

    def data_received(self, data: bytes) -> None:
        self._note(data)

    def eof_received(self) -> None:
        self._note("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self._note("lost")

    async def until(self, what: str | bytes) -> None:
        async with asyncio.timeout(10):
            while what not in self.seen:
                self.something.clear()
                await self.something.wait()


Scene = Callable[[Connection, BodyBufferPool, socket.socket], object]


def play(factory: Callable[[], asyncio.AbstractEventLoop], scene: Scene) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        memory = BodyBufferPool(4 * 2**20)
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            _, connection = await loop.connect_accepted_socket(lambda: Connection(memory), theirs)
            await scene(connection, memory, ours)  # type: ignore[misc]
            connection.transport.close()
            await connection.until("lost")

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Scene], None]:
    return lambda scene: play(request.param, scene)


def test_bodies_lie_aligned_in_memory_that_is_free_as_soon_as_nobody_looks(
    run: Callable[[Scene], None],
) -> None:
    async def scene(connection: Connection, memory: BodyBufferPool, client: socket.socket) -> None:
        places = set()
        for n in range(6):
            connection.whole = n >= 3
            await asyncio.get_running_loop().sock_sendall(client, BLOCK + bytes([n]) * SIZE)
            await connection.until("body")
            (body,) = connection.bodies
            assert body == bytes([n]) * SIZE
            assert body.readonly
            assert address(body) % ALIGNMENT == 0
            places.add(address(body) // 4096)
            connection.bodies.clear()
            connection.seen.clear()
            del body
            await asyncio.sleep(0.01)
        assert len(places) == 1
        free = memory.take(len(BLOCK), SIZE, several=False).view  # while it waits for the next
        assert address(free[len(BLOCK) :]) // 4096 in places
        assert connection.receiver.active

    run(scene)


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_with_another_trace_is_expected_too(run: Callable[[Scene], None], whole: bool) -> None:
    async def scene(connection: Connection, memory: BodyBufferPool, client: socket.socket) -> None:
        connection.whole = whole
        for block in (TRACED_BLOCK, BLOCK, TRACED_BLOCK):
            await asyncio.get_running_loop().sock_sendall(client, block + b"a" * SIZE)
            await connection.until("body")
            (body,) = connection.bodies
            assert body == b"a" * SIZE
            assert address(body) % ALIGNMENT == 0
            assert connection.seen == (["body"] if connection.heads and whole else ["head", "body"])
            connection.bodies.clear()
            connection.seen.clear()
            del body
        assert connection.receiver.active
        if whole and connection.heads:
            assert connection.heads[-1] is TRACED

    run(scene)


@pytest.mark.parametrize(
    "other",
    [
        Head("/y", SIZE + 1, True, None, None, None),
        Head("/y", SIZE, False, None, None, None),
        Head("/y", SIZE, True, PredictRequest(model="m"), None, None),
    ],
)
def test_a_head_that_is_not_like_the_last_is_left_to_the_connection(
    run: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch, other: Head
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TRACED", other)

    async def scene(connection: Connection, memory: BodyBufferPool, client: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(client, TRACED_BLOCK + b"a" * 100)
        await connection.until(TRACED_BLOCK + b"a" * 100)
        assert not connection.receiver.active
        assert not connection.bodies

    run(scene)


@pytest.mark.parametrize("arrived", [0, 1, 5_000])
def test_the_rest_of_a_body_is_received_in_place_and_so_is_the_next(
    run: Callable[[Scene], None], arrived: int
) -> None:
    """Many clients send the head first and then the body."""

    async def scene(connection: Connection, memory: BodyBufferPool, client: socket.socket) -> None:
        send = asyncio.get_running_loop().sock_sendall
        connection.receiver.stop()
        connection.receiver.begin(HEAD, BLOCK, memoryview(b"a" * arrived))
        await send(client, b"a" * (SIZE - arrived))
        await connection.until("body")
        assert connection.seen == ["body"]
        connection.seen.clear()
        await send(client, BLOCK)
        await connection.until("head")
        await send(client, b"b" * SIZE)
        await connection.until("body")
        assert connection.seen == ["head", "body"]
        assert [body == byte * SIZE for body, byte in zip(connection.bodies, (b"a", b"b"), strict=True)] == [
            True
        ] * 2
        assert connection.receiver.active

    run(scene)


def test_what_follows_a_body_is_handed_on_and_never_part_of_it(run: Callable[[Scene], None]) -> None:
    async def scene(connection: Connection, memory: BodyBufferPool, client: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(client, BLOCK + b"a" * SIZE + b"next")
        await connection.until("body")
        await connection.until(b"next")
        assert connection.bodies[0] == b"a" * SIZE
        assert connection.transport.get_protocol() is connection

    run(scene)


@pytest.mark.parametrize("accepts", [True, False])
def test_whatever_else_comes_is_handed_on(run: Callable[[Scene], None], accepts: bool) -> None:
    first = b"GET /other" if accepts else BLOCK + b"some"

    async def scene(connection: Connection, memory: BodyBufferPool, client: socket.socket) -> None:
        connection.accepts = accepts
        await asyncio.get_running_loop().sock_sendall(client, first)
        await connection.until(first if accepts else b"some")
        assert connection.transport.get_protocol() is connection
        await asyncio.get_running_loop().sock_sendall(client, b"more")
        await connection.until(b"more")
        client.shutdown(socket.SHUT_WR)
        await connection.until("eof")
        assert not connection.bodies

    run(scene)


def test_an_end_within_a_body_is_told_and_lets_its_memory_go(run: Callable[[Scene], None]) -> None:
    async def scene(connection: Connection, memory: BodyBufferPool, client: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(client, BLOCK + b"a" * 1000)
        await connection.until("head")
        client.close()
        await connection.until("lost")
        assert connection.seen[0] == "head"
        assert not connection.bodies
        await asyncio.sleep(0)
        kept = memory.kept_bytes
        memory.take(len(BLOCK), SIZE, several=False)
        assert memory.kept_bytes == kept

    run(scene)


def test_a_read_in_vain_does_not_write_into_what_came_meanwhile() -> None:
    """The loop asks for room and then has nothing to read; before it does, the room below is given to another."""
    memory = BodyBufferPool(16 * 2**20)
    raw = Head("/x", SIZE, True, PredictRequest(model="m"), None, None)
    first, second = Connection(memory), Connection(memory)
    for connection in (first, second):
        connection.whole = True
        connection.transport = Unread()  # type: ignore[assignment]
        connection.receiver.expect(raw, BLOCK)

    def arrives(connection: Connection, byte: bytes) -> None:
        connection.receiver.get_buffer(-1)[:] = BLOCK + byte * SIZE
        connection.receiver.buffer_updated(len(BLOCK) + SIZE)

    first.receiver.get_buffer(-1)
    arrives(second, b"2")
    arrives(first, b"1")
    assert second.bodies == [b"2" * SIZE]
    assert first.bodies == [b"1" * SIZE]


class Unread:
    """A transport of which only the protocol is exchanged."""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass
