"""The control socket between the supervisor and a process that it has started.

supervisor → process   hello, engine | front (somebody to talk to, with descriptors), accept, collect, scraped, drain,
                       stop
process → supervisor   ready, beat, collected, scrape, unloaded, unconnected (a front without an engine process), fatal
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from vernier.border.records import wire
from vernier.border.records.channel import Channel, close_all
from vernier.border.records.messages import read_message, write_message
from vernier.exposition_merge import families_of

BEAT_S = 0.5
#: What a process sends that cannot start and would not the next time: the supervisor ends with its message.
FATAL = "fatal"

OnMessage = Callable[[dict[str, Any], list[int]], None]


class Control:
    """One end. Belongs to the event loop's thread.

    Args:
        on_message: gets each message with the file descriptors that came along, which are its own to close.
    """

    def __init__(self, sock: socket.socket, on_message: OnMessage, on_closed: Callable[[], None]) -> None:
        self._on_message = on_message
        self._channel = Channel(sock, self._take, on_closed)

    def _take(self, record: memoryview, fds: list[int]) -> None:
        try:
            if wire.kind_of(record) != wire.JSON:
                raise wire.WireError("a control record that is no message")
            message = read_message(record, fds)
        except wire.WireError:
            close_all(fds)
            raise
        if len(record) == 1:  # the descriptor held the message
            close_all(fds)
            fds = []
        self._on_message(message, fds)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """The descriptors are closed here once they have been sent."""
        write_message(self._channel, message, fds)

    def flush(self) -> None:
        self._channel.flush()

    def close(self) -> None:
        self._channel.close()


class Child:
    """The side of a process that the supervisor has started: what all of them do.

    Attributes:
        hello: the first message, and its file descriptors; cancelled when the supervisor goes before it.
        ended: set when the supervisor has gone.
    """

    def __init__(self, sock: socket.socket, on_message: OnMessage) -> None:
        self._loop = asyncio.get_running_loop()
        self._other = on_message
        self.hello: asyncio.Future[tuple[dict[str, Any], list[int]]] = self._loop.create_future()
        self.ended = asyncio.Event()
        self._registry: CollectorRegistry | None = None
        self._control = Control(sock, self._take, self._closed)
        self.send = self._control.send

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message.get("type")
        if kind == "hello" and not self.hello.done():
            self.hello.set_result((message, fds))
        elif kind == "collect":
            close_all(fds)
            self.tell_metrics(message["id"])
        else:
            self._other(message, fds)

    def _closed(self) -> None:
        self.ended.set()
        self.hello.cancel()

    def tell_metrics(self, number: int | None) -> None:
        families = families_of(self._registry) if self._registry is not None else []
        self.send({"type": "collected", "id": number, "families": families})

    async def beat(self, registry: CollectorRegistry) -> None:
        """Tells the supervisor for ever that the loop turns. registry: what this process counts in."""
        self._registry = registry
        while True:
            self.send({"type": "beat", "at": time.monotonic()})
            await asyncio.sleep(BEAT_S)

    def close(self) -> None:
        """Sends the last figures, and ends."""
        self.tell_metrics(None)
        self._control.close()
