"""Requests that were running when an engine process died: one of them runs at a time, whichever front sent it, so that
the one which kills the next engine process takes no other one's last try with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vernier.border.batch import RequestBatch

#: After a deadline, by every clock.
_SURELY_S = 0.01


class LastTries:
    """Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, tuple[RequestBatch, Callable[[], None]]] = {}  # by the identity of the batch
        self._running: RequestBatch | None = None

    def add(self, batch: RequestBatch, start: Callable[[], None]) -> None:
        """Calls `start` when no other one runs; `ended` must be called afterwards, when the batch is released."""
        self._waiting[id(batch)] = batch, start
        self._next()
        if batch.deadlines is not None and id(batch) in self._waiting:
            self._loop.call_at(min(batch.deadlines) + _SURELY_S, self._late, batch)

    def _late(self, batch: RequestBatch) -> None:
        """Its deadline has come before its turn: the scheduler refuses it."""
        waiting = self._waiting.get(id(batch))
        if waiting is not None and waiting[0] is batch:
            del self._waiting[id(batch)]
            waiting[1]()

    def withdraw(self, batch: RequestBatch) -> bool:
        """The batch shall not be started any more. False when it has been."""
        return self._waiting.pop(id(batch), None) is not None

    def ended(self, batch: RequestBatch) -> None:
        """Nothing happens for batches that never came here."""
        if batch is self._running:
            self._running = None
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        if self._running is None and self._waiting:
            self._running, start = self._waiting.pop(next(iter(self._waiting)))
            start()
