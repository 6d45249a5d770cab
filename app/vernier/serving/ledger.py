"""The one place where an admitted request ends, so that it ends exactly once and is counted once.

Ending and telling are two steps: first all books are brought in order, then `deliver` calls `done`, which
may submit the next request at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vernier.errors import DeadlineExceeded, VernierError
from vernier.metrics import ModelMetrics
from vernier.serving.batcher import Batcher
from vernier.serving.request import ENDED, NEW, QUEUED, Answer, PendingRequest


class Ledger:
    """Belongs to the event loop's thread.

    Args:
        report: gets the context of an exception that left a request's `done`.

    Attributes:
        inflight: requests that were admitted and have not ended.
        empty: set while nothing is in flight.
    """

    def __init__(
        self, batcher: Batcher, metrics: ModelMetrics, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self.inflight = 0
        self.empty = asyncio.Event()
        self.empty.set()
        self._batcher = batcher
        self._metrics = metrics
        self._report = report
        self._untold: list[tuple[PendingRequest, Answer | None, VernierError | None]] = []

    def admitted(self, n: int = 1) -> None:
        if not self.inflight:
            self.empty.clear()
        self.inflight += n
        self._metrics.admitted(n)

    def passed(self, n: int) -> None:
        """Requests that were admitted and answered in one step, and are told by their owner."""
        self._metrics.admitted(n)
        self._metrics.ended("answered", n)

    def answered(self, answers: list[tuple[PendingRequest, Answer]]) -> None:
        """Ends requests that have not ended."""
        untold = self._untold
        count = 0
        for request, answer in answers:
            request.state = ENDED
            untold.append((request, answer, None))
            count += request.count
        self._left("answered", count)

    def failed(self, request: PendingRequest, error: VernierError) -> None:
        if self._end(request, "failed"):
            self._untold.append((request, None, error))

    def expired(self, request: PendingRequest) -> None:
        if self._end(request, "expired"):
            error = DeadlineExceeded(
                "the deadline passed before the answer was ready; allow more time or send less"
            )
            self._untold.append((request, None, error))

    def cancelled(self, request: PendingRequest) -> bool:
        """False when the request had ended already. Its `done` is not called."""
        return self._end(request, "cancelled")

    def _end(self, request: PendingRequest, outcome: str) -> bool:
        if request.state == NEW or request.state == ENDED:
            return False
        if request.state == QUEUED and not request.taken:
            request.inputs = {}  # the queue may keep it for a while; nobody reads its arrays any more
        self._batcher.discard(request)
        self._left(outcome, request.count)
        return True

    def _left(self, outcome: str, n: int) -> None:
        self.inflight -= n
        self._metrics.ended(outcome, n)
        if not self.inflight:
            self.empty.set()

    def deliver(self) -> None:
        """Calls `done` of every request that has ended since the last time."""
        untold = self._untold
        if not untold:
            return
        self._untold = []
        for request, answer, error in untold:
            try:
                request.done(answer, error)
            except Exception as fault:
                # One protocol's fault must not cost the others of its batch their answers.
                self._report({"message": "an answer could not be delivered", "exception": fault})
