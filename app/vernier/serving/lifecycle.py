"""Start and end of the service: readiness, and a drain that loses no admitted request.

    readiness red → wait `drain_delay_s` (load balancers look away) → stop accepting → finish → free

uvicorn runs the lifespan's shutdown last, too late to turn readiness red; so the signal is taken
first here, and handed on to uvicorn when the delay is over.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from enum import Enum
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class Phase(Enum):
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle:
    """The phase of the process. Belongs to the event loop's thread."""

    def __init__(self, drain_delay_s: float) -> None:
        self.phase = Phase.STARTING
        self._drain_delay_s = drain_delay_s
        self._previous: dict[int, Any] = {}
        self._handed_on = False

    def started(self) -> None:
        self.phase = Phase.RUNNING

    def stopped(self) -> None:
        self.phase = Phase.STOPPED

    @property
    def draining(self) -> bool:
        return self.phase in (Phase.DRAINING, Phase.STOPPED)

    @property
    def refuses_new(self) -> bool:
        """True once the delay is over: requests on connections that are still open are refused."""
        return self._handed_on or self.phase is Phase.STOPPED

    def take_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        """Puts the drain in front of the server's own handlers for SIGTERM and SIGINT.

        Does nothing outside the main thread, where signals cannot be handled.
        """
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(number)
                self._previous[number] = previous
                signal.signal(number, self._handler(loop, previous))
        except ValueError:
            self._previous.clear()

    def release_signals(self) -> None:
        """Gives the handlers back."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def drain(self, loop: asyncio.AbstractEventLoop, hand_on: Callable[[], None]) -> None:
        """Turns readiness red; after the delay new requests are refused and `hand_on` is called. A second call ends the
        delay at once."""
        if self.phase is Phase.DRAINING:
            self._hand_on(hand_on)
            return
        self.phase = Phase.DRAINING
        loop.call_later(self._drain_delay_s, self._hand_on, hand_on)

    def _hand_on(self, hand_on: Callable[[], None]) -> None:
        self._handed_on = True
        hand_on()

    def _handler(
        self, loop: asyncio.AbstractEventLoop, previous: Any
    ) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            def hand_on() -> None:
                if callable(previous):
                    previous(number, None)

            def begin() -> None:
                if self.phase is not Phase.DRAINING:
                    logger.info("draining", extra={"signal": signal.Signals(number).name})
                self.drain(loop, hand_on)

            loop.call_soon_threadsafe(begin)

        return handle
