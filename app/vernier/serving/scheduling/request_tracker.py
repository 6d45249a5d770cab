"""The one place where a request ends, so that it ends exactly once and is counted once.

Ending and telling are two steps: first all books are brought in order, then `deliver` tells the targets, which
may submit, or cancel, at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from vernier.border.batch import Answer, RequestBatch
from vernier.errors import DeadlineExceeded, VernierError
from vernier.metrics import ModelMetrics

#: What a target will be told: a range of requests with their answer, requests with their error, or for no requests that
#: the batch is released.
_Event = tuple[RequestBatch, Sequence[int] | None, Answer | None, VernierError | None]


class RequestTracker:
    """Belongs to the event loop's thread.

    Args:
        report: gets the context of an exception that left a target.

    Attributes:
        inflight: requests that were admitted and have not ended.
        empty: set while none is in flight.
        delivering: whether targets are being told; a call that comes meanwhile comes from one of them.
        held: `deliver` does nothing.
    """

    def __init__(self, metrics: ModelMetrics, report: Callable[[dict[str, Any]], None]) -> None:
        self.inflight = 0
        self.empty = asyncio.Event()
        self.empty.set()
        self.delivering = False
        self.held = False
        self._metrics = metrics
        self._report = report
        self._events: deque[_Event] = deque()

    # --- requests ---------------------------------------------------------------------------------
    def admitted(self, count: int) -> None:
        """So many requests will end, each as one of the methods below says."""
        if not self.inflight:
            self.empty.clear()
        self.inflight += count
        self._metrics.admitted(count)

    def refused(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        """Requests that were not admitted."""
        self._events.append((batch, requests, None, error))
        self._end(batch, requests)

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        self._events.append((batch, requests, answer, None))
        self._ended(batch, requests, "answered")

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        self._events.append((batch, requests, None, error))
        self._ended(batch, requests, "failed")

    def expired(self, batch: RequestBatch, requests: Sequence[int]) -> None:
        error = DeadlineExceeded(
            "the deadline passed before the answer was ready; allow more time or send less"
        )
        self._events.append((batch, requests, None, error))
        self._ended(batch, requests, "expired")

    def cancelled(self, batch: RequestBatch, request: int) -> None:
        """The target is not told."""
        self._ended(batch, (request,), "cancelled")

    def _ended(self, batch: RequestBatch, requests: Sequence[int], outcome: str) -> None:
        count = len(requests)
        self._metrics.ended(outcome, count)
        self.inflight -= count
        if not self.inflight:
            self.empty.set()
        self._end(batch, requests)

    def _end(self, batch: RequestBatch, requests: Sequence[int]) -> None:
        state = batch.state
        state.end(requests)
        if not state.left and not state.readers:
            self._events.append((batch, None, None, None))

    # --- batches ----------------------------------------------------------------------------------
    def has_read(self, batch: RequestBatch) -> None:
        """An execution does not read a part of the batch any more."""
        state = batch.state
        state.readers -= 1
        if not state.readers and not state.left:
            self._events.append((batch, None, None, None))

    def deliver(self) -> None:
        """Tells targets what has happened since the last time, in order. Called by a target, directly or not, it
        does nothing: the call that is under way tells that, too."""
        if self.delivering or self.held:
            return
        events = self._events
        self.delivering = True
        try:
            while events:  # more may come meanwhile
                batch, requests, answer, error = events.popleft()
                try:
                    if requests is None:
                        batch.target.released(batch)
                    elif answer is not None:
                        batch.target.answered(batch, cast(range, requests), answer)
                    else:
                        batch.target.failed(batch, requests, cast(VernierError, error))
                except Exception as fault:
                    # One target's fault must not cost the others their answers.
                    self._report({"message": "an answer could not be delivered", "exception": fault})
        finally:
            self.delivering = False
