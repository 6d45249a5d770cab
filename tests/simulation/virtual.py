"""A loop with a clock of its own, and a wire between a client and a connection: nothing waits, and nothing is chance.

The wire is as unkind as TCP may be: it cuts what is sent where it likes, holds back what is not read, and a close while
bytes of the client are unread is a reset, which takes from the client what it has not read yet.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Iterable
from typing import Any

#: What lies between client and service in each direction beside their own buffers.
_KERNEL_BYTES = 32 * 1024
_HIGH_WATER, _LOW_WATER = 64 * 1024, 16 * 1024
_MOST_AT_ONCE = 64 * 1024


class Stuck(Exception):
    """Nothing will ever happen any more."""


class _NoFiles(selectors.BaseSelector):
    """Time passes instead of waiting for files."""

    def __init__(self) -> None:
        self.loop: VirtualLoop | None = None

    def select(self, timeout: float | None = None) -> list[Any]:
        assert self.loop is not None
        if timeout is None:
            raise Stuck
        self.loop.now += max(timeout, 0.0)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        raise KeyError(fileobj)

    def get_map(self) -> Any:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs at once what is due, and moves its clock on when nothing is."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _NoFiles()
        super().__init__(selector)
        selector.loop = self
        self._clock_resolution = 1e-9
        self.faults: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.faults.append(context))

    def time(self) -> float:
        return self.now


class Wire(asyncio.Transport):
    """The service's end of a connection, with the client's end beside it."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        super().__init__()
        self._loop = loop
        self._rng = rng
        self._protocol: Any = None
        self._sent = bytearray()  # by the client, not yet read by the service
        self._out = bytearray()  # written by the service, not yet in the kernel
        self._reading = True
        self._delivering = False
        self._client_eof = False
        self._eof_told = False
        self._service_eof = False
        self._write_paused = False
        self._closing = False
        self._lost = False
        # the client's side
        self.kernel = bytearray()  # readable by the client
        self.ended = False  # the client sees the end behind what it can read
        self.reset = False
        self.news = asyncio.Event()

    def connect(self, protocol: Any) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    # --- the client -------------------------------------------------------------------------------
    async def send(self, data: bytes) -> bool:
        """False when the service does not take it any more."""
        while len(self._sent) > _KERNEL_BYTES and not self._lost:
            await self._news()
        if self._lost or self._closing:
            self._break()
            return False
        self._sent += data
        self._deliver_soon()
        return True

    def half_close(self) -> None:
        self._client_eof = True
        self._deliver_soon()

    def cut(self) -> None:
        """A reset by the client."""
        self.ended = self.reset = True
        self._lose(ConnectionResetError())

    def read(self, most: int) -> bytes:
        data = bytes(self.kernel[:most])
        del self.kernel[:most]
        self._flush()
        return data

    async def _news(self) -> None:
        self.news.clear()
        await self.news.wait()

    def _tell(self) -> None:
        self.news.set()

    def _break(self) -> None:
        """The service has closed, and something is sent there: a reset."""
        if not self.reset:
            self.reset = self.ended = True
            self.kernel.clear()
        self._tell()

    # --- in ---------------------------------------------------------------------------------------
    def _deliver_soon(self) -> None:
        if not self._delivering:
            self._delivering = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._delivering = False
        if self._closing or not self._reading or self._lost:
            return
        if self._sent:
            size = min(len(self._sent), _MOST_AT_ONCE)
            if self._rng.random() < 0.3:
                size = self._rng.randint(1, size)
            if isinstance(self._protocol, asyncio.BufferedProtocol):
                buffer = memoryview(self._protocol.get_buffer(-1))
                size = min(size, len(buffer))
                buffer[:size] = self._sent[:size]
                del self._sent[:size]
                self._protocol.buffer_updated(size)
            else:
                data = bytes(self._sent[:size])
                del self._sent[:size]
                self._protocol.data_received(data)
            self._tell()
            self._deliver_soon()
        elif self._client_eof and not self._eof_told:
            self._eof_told = True
            if not self._protocol.eof_received():
                self.close()

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._deliver_soon()

    def is_reading(self) -> bool:
        return self._reading

    # --- out --------------------------------------------------------------------------------------
    def write(self, data: Any) -> None:
        assert not self._service_eof, "a write behind the end"
        if self._lost or self._closing:
            return
        self._out += data
        self._flush()
        if len(self._out) > _HIGH_WATER and not self._write_paused:
            self._write_paused = True
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def _flush(self) -> None:
        room = _KERNEL_BYTES - len(self.kernel)
        if room > 0 and self._out and not self.reset:
            self.kernel += self._out[:room]
            del self._out[:room]
        if self._write_paused and len(self._out) <= _LOW_WATER:
            self._write_paused = False
            self._loop.call_soon(self._resume_writing)
        if not self._out:
            if self._service_eof:
                self.ended = True
            if self._closing and not self._lost:
                self._loop.call_soon(self._end)
        self._tell()

    def _resume_writing(self) -> None:
        if not self._lost:
            self._protocol.resume_writing()

    def get_write_buffer_size(self) -> int:
        return len(self._out)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._service_eof = True
        self._flush()

    # --- the end ----------------------------------------------------------------------------------
    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._flush()

    def _end(self) -> None:
        if self._lost:
            return
        self.ended = True
        if self._sent:  # unread by the service
            self._break()
        self._lose(None)

    def abort(self) -> None:
        if not self._lost:
            self._closing = True
            self._break()
            self._loop.call_soon(self._lose, ConnectionAbortedError())

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = self._closing = True
            self._out.clear()
            self._protocol.connection_lost(error)
            self._tell()

    def is_closing(self) -> bool:
        return self._closing

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)
