"""Records and descriptors through a socket: in order, without blocking, and nothing left open."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.scheduling import until
from vernier.border.memory.arena import create_memfd
from vernier.border.records.channel import Channel, socket_pair
from vernier.border.records.messages import read_message, write_message
from vernier.border.records.wire import WireError


class End:
    """One end, which remembers what it was given."""

    def __init__(self, sock: socket.socket) -> None:
        self.records: list[bytes] = []
        self.fds: list[int] = []
        self.closed = 0
        self.fault: Exception | None = None
        self.channel = Channel(sock, self._take, self._closed)

    def _take(self, record: memoryview, fds: list[int]) -> None:
        self.records.append(bytes(record))
        self.fds += [os.fstat(fd).st_size for fd in fds]
        for fd in fds:
            os.close(fd)
        if self.fault is not None:
            raise self.fault

    def _closed(self) -> None:
        self.closed += 1


@pytest.fixture
async def ends() -> Any:
    ours, theirs = socket_pair()
    pair = End(ours), End(theirs)
    yield pair
    for end in pair:
        end.channel.close()


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_records_keep_their_order_whatever_waits_and_whatever_bears_descriptors(
    ends: tuple[End, End],
) -> None:
    ours, theirs = ends
    ours.channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 60_000)
    theirs.channel._loop.remove_reader(theirs.channel._socket.fileno())
    sent, sizes = [], []
    for number in range(600):
        record = b"%d " % number * (1 + 700 * (number % 3))
        fds = (create_memfd("test", number + 1),) if number % 5 == 0 else ()
        sizes += [number + 1] if fds else []
        ours.channel.write(record, fds)
        sent.append(record)
        if number % 50 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ours.channel._backlog
    theirs.channel._loop.add_reader(theirs.channel._socket.fileno(), theirs.channel._readable)
    await until(lambda: len(theirs.records) == len(sent))
    assert theirs.records == sent
    assert theirs.fds == sizes


async def test_descriptors_that_wait_are_closed_with_the_channel(ends: tuple[End, End]) -> None:
    ours, theirs = ends
    theirs.channel._loop.remove_reader(theirs.channel._socket.fileno())
    for _ in range(400):
        ours.channel.write(bytes(40_000), (create_memfd("test", 1),))
    assert ours.channel._backlog
    ours.channel.close()
    ours.channel.write(b"late", (create_memfd("test", 1),))
    theirs.channel.close()
    assert (ours.closed, theirs.closed) == (0, 0)


@pytest.mark.parametrize("waits", [False, True])
async def test_the_end_of_the_other_side_is_told_once_and_never_within_a_write(
    ends: tuple[End, End], waits: bool
) -> None:
    ours, theirs = ends
    if waits:
        theirs.channel._loop.remove_reader(theirs.channel._socket.fileno())
        for _ in range(400):
            ours.channel.write(bytes(40_000), (create_memfd("test", 1),))
        assert ours.channel._backlog
    ours.channel._loop.remove_reader(ours.channel._socket.fileno())
    theirs.channel.close()
    ours.channel.write(b"x", (create_memfd("test", 1),))
    ours.channel.write(b"y")
    assert ours.closed == 0
    await until(lambda: ours.closed == 1)
    ours.channel.close()
    await asyncio.sleep(0)
    assert (ours.closed, theirs.closed) == (1, 0)


@pytest.mark.parametrize("datagram", [b"\1", struct.pack("<I", 9) + b"abc", struct.pack("<I", 1) + b"ab\0"])
async def test_a_side_that_breaks_the_rules_is_left(ends: tuple[End, End], datagram: bytes) -> None:
    ours, theirs = ends
    fd = create_memfd("test", 1)
    socket.send_fds(ours.channel._socket, [datagram], [fd])
    os.close(fd)
    await until(lambda: theirs.closed == 1 and ours.closed == 1)


async def test_a_shortage_of_the_kernel_is_waited_for(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = ends
    failures = [OSError(errno.ETOOMANYREFS, "too many references"), OSError(errno.ENOBUFS, "no buffers")]

    class Short:
        """A socket that fails at first."""

        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock

        def sendmsg(self, *arguments: Any) -> int:
            if failures:
                raise failures.pop()
            return self._sock.sendmsg(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

    monkeypatch.setattr(ours.channel, "_socket", Short(ours.channel._socket))
    ours.channel.write(b"first", (create_memfd("test", 7),))
    ours.channel.write(b"second")
    await until(lambda: len(theirs.records) == 2)
    assert (theirs.records, theirs.fds, ours.closed) == ([b"first", b"second"], [7], 0)


async def test_a_record_that_cannot_be_taken_does_not_stop_the_others(ends: tuple[End, End]) -> None:
    ours, theirs = ends
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    theirs.fault = WireError("nonsense")
    ours.channel.write(b"a", (create_memfd("test", 1),))
    ours.channel.write(b"b")
    await until(lambda: len(reported) == 2)
    assert theirs.records == [b"a", b"b"]


@pytest.mark.parametrize("size", [10, 90_000, 2_000_000])
async def test_messages_of_any_size(size: int) -> None:
    ours, theirs = socket_pair()
    got: list[Any] = []

    def take(record: memoryview, fds: list[int]) -> None:
        got.append(read_message(record, fds))
        for fd in fds:
            os.close(fd)

    sender = Channel(ours, lambda record, fds: None, lambda: None)
    receiver = Channel(theirs, take, lambda: None)
    write_message(sender, {"text": "x" * size})
    write_message(sender, {"after": 1})
    await until(lambda: len(got) == 2)
    assert got == [{"text": "x" * size}, {"after": 1}]
    sender.close()
    receiver.close()


def test_a_message_in_something_that_is_no_memory_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(WireError):
            read_message(memoryview(b"\7"), [writing])
    finally:
        os.close(reading)
        os.close(writing)
