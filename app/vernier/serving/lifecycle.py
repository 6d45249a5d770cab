"""Start and end of the service: readiness, and a drain that loses no admitted request.

    readiness red, every answer ends its connection → wait `drain_delay_s` (load balancers look away)
    → stop accepting → finish → free

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

#: How long requests are still served after a delay, on connections that were idle when the service stopped accepting.
_GRACE_S = 1.0


class Phase(Enum):
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle:
    """The phase of the process. Belongs to the event loop's thread."""

    def __init__(self, drain_delay_s: float) -> None:
        self.phase = Phase.STARTING
        self.draining = False  # an attribute: connections ask with every answer
        self._drain_delay_s = drain_delay_s
        self._previous: dict[int, Any] = {}
        self._refuses = False

    def started(self) -> None:
        self.phase = Phase.RUNNING

    def stopped(self) -> None:
        self.phase = Phase.STOPPED
        self.draining = True

    @property
    def refuses_new(self) -> bool:
        """True a moment after the delay: requests on connections that are still open are refused."""
        return self._refuses or self.phase is Phase.STOPPED

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
        """Turns readiness red; after the delay `hand_on` is called, and a moment later new requests are refused.

        A second call ends the delay at once.
        """
        if self.phase is Phase.DRAINING:
            self._hand_on(hand_on, 0.0)
            return
        self.phase = Phase.DRAINING
        self.draining = True
        delay_s = self._drain_delay_s
        loop.call_later(delay_s, self._hand_on, hand_on, _GRACE_S if delay_s else 0.0, loop)

    def _hand_on(
        self, hand_on: Callable[[], None], grace_s: float, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        if grace_s and loop is not None:
            loop.call_later(grace_s, self._refuse)
        else:
            self._refuse()
        hand_on()

    def _refuse(self) -> None:
        self._refuses = True

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
