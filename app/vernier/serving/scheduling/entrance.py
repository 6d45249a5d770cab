"""The entrance of a model: which requests of a batch run at once, which are queued, and which are refused."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from vernier.border.batch import RequestBatch
from vernier.errors import (
    DeadlineExceeded,
    Draining,
    NotReady,
    QueueFull,
    UnsupportedPrecision,
    VernierError,
)
from vernier.metrics import ModelMetrics
from vernier.serving.queueing.batcher import Batcher
from vernier.serving.queueing.span import BatchState, runs
from vernier.serving.scheduling.dispatcher import Dispatcher
from vernier.serving.scheduling.inline import Inline
from vernier.serving.scheduling.request_tracker import RequestTracker

#: Inputs that are worth more where they lie than beside others: an execution of several batches copies them.
_LARGE_BYTES = 256 * 1024


class Entrance:
    """Belongs to the event loop's thread. The arguments are as those of Scheduler, or its parts.

    Attributes:
        draining: nothing is admitted any more.
    """

    def __init__(
        self,
        name: str,
        batcher: Batcher,
        tracker: RequestTracker,
        inline: Inline,
        dispatcher: Dispatcher,
        metrics: ModelMetrics,
        clock: Callable[[], float],
        at_once: bool,
    ) -> None:
        self.draining = False
        self._name = name
        self._batcher = batcher
        self._queue = batcher.queue
        self._layout = batcher.layout
        self._tracker = tracker
        self._inline = inline
        self._dispatcher = dispatcher
        self._pool = dispatcher.pool
        self._metrics = metrics
        self._clock = clock
        self._at_once = at_once

    def submit(self, batch: RequestBatch) -> None:
        """See `Scheduler.submit`."""
        now, tracker = self._clock(), self._tracker
        batch.state = BatchState(batch.rows, now)
        tracker.held = (
            True  # until every request stands somewhere: what a target is told, it may answer with `cancel`
        )
        try:
            closed = self._closed() or self._no_variant(batch.precision)
            if closed is not None:
                self._refuse(batch, range(len(batch.rows)), closed)
            else:
                for run in self._in_time(batch, now):
                    start = self._run_at_once(batch, run, now)
                    if start < run.stop:
                        self._admit(batch, start, run.stop, now)
        finally:
            tracker.held = False
        tracker.deliver()

    def _no_variant(self, precision: str | None) -> VernierError | None:
        """For a variant that was loaded when the request was read and is not any more."""
        if precision is None or self._batcher.has(precision):
            return None
        return UnsupportedPrecision(f"model '{self._name}' has no '{precision}' variant now")

    def _in_time(self, batch: RequestBatch, now: float) -> Sequence[range]:
        """The requests whose deadline has not passed; fails the others."""
        count, deadlines = len(batch.rows), batch.deadlines
        if deadlines is None or min(deadlines) > now:
            return (range(count),)
        late = [request for request in range(count) if deadlines[request] <= now]
        error = DeadlineExceeded(
            "the deadline had passed before the request could be queued; allow more time"
        )
        self._refuse(batch, late, error)
        return runs(request for request in range(count) if deadlines[request] > now)

    def _run_at_once(self, batch: RequestBatch, requests: range, now: float) -> int:
        """Runs requests on this thread, by as many from the front as are quick enough together.

        Returns the first that was not run: something waits before it, or it is no part of a batch that is quick
        enough, or would be late.
        """
        start, stop, deadlines = requests.start, requests.stop, batch.deadlines
        if not self._at_once and sum([array.nbytes for array in batch.inputs.values()]) < _LARGE_BYTES:
            return start
        room = self._room_at_once(batch.precision)
        if not room or (
            deadlines is not None
            and self.refusal(batch.precision, batch.priority, min(deadlines[start:stop])) is not None
        ):
            return start
        starts = batch.state.starts
        while room:
            fit = bisect_right(starts, starts[start] + room, start + 1, stop + 1) - 1
            if fit == start:
                break
            self._tracker.admitted(fit - start)
            self._dispatcher.run_inline(self._batcher.take_at_once(batch, range(start, fit), now))
            start = fit
            if start == stop:
                break
            now, room = self._clock(), self._room_at_once(batch.precision)
        return start

    def _room_at_once(self, precision: str | None) -> int:
        """The most rows that run at once on this thread; 0 for none."""
        layout = self._layout
        if not self._inline.slots or self._queue.requests or self._tracker.delivering:
            return 0  # a target that answers each answer with a request must not hold up the loop
        if layout.kind != "dynamic" or layout.dims or self._pool.gone is not None:
            return 0
        precision = precision or self._batcher.precision
        return self._inline.room(precision, (), self._batcher.curve(precision, ()))

    def _admit(self, batch: RequestBatch, start: int, stop: int, now: float) -> None:
        """Has the requests [start, stop) wait, or refuses them."""
        closed = self._closed()
        if closed is not None:  # the device was lost when the first of the batch ran
            self._refuse(batch, range(start, stop), closed)
            return
        refused = self._batcher.admit(batch, start, stop, now, self._free_at)
        admitted = stop - start
        for requests, error in refused:
            admitted -= len(requests)
            self._tracker.refused(batch, requests, error)
            self._count_refused(error, len(requests))
        if admitted:
            self._tracker.admitted(admitted)
            self._dispatcher.show()
            if self._pool.idle or self._inline.slots or batch.deadlines is not None:
                self._dispatcher.pump_soon()

    def _refuse(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        self._tracker.refused(batch, requests, error)
        self._metrics.rejected(error.code, len(requests))

    def refusal(
        self, precision: str | None = None, priority: int = 0, deadline: float | None = None
    ) -> VernierError | None:
        """See `Scheduler.refusal`."""
        closed = self._closed()
        if closed is not None:
            return closed
        if self._pool.idle and not self._queue.requests:
            return None  # it would start at once; the batcher says so too, but takes longer
        now = self._clock()
        return self._batcher.refusal(precision, priority, deadline, now, self._free_at)

    def refused(self, error: VernierError, count: int = 1, rows: int = 1) -> None:
        """See `Scheduler.refused`."""
        if isinstance(error, QueueFull):
            self._batcher.rate.add(count * rows)
            self._count_refused(error, count)
        else:
            self._metrics.rejected(error.code, count)

    def _count_refused(self, error: QueueFull, count: int) -> None:
        self._metrics.rejected(error.reason, count)
        self._dispatcher.retry_after_s = error.retry_after_s

    def _closed(self) -> VernierError | None:
        """Why nothing is admitted any more; None while something is."""
        if self.draining:
            return Draining(f"model '{self._name}' is being taken out of service; send the request again")
        if self._pool.gone is not None:
            return NotReady(f"model '{self._name}' cannot run any more; send the request to another instance")
        return None

    def cancel(self, batch: RequestBatch, request: int) -> None:
        """See `Scheduler.cancel`."""
        if batch.state is None or batch.state.ended[request]:
            return
        self._batcher.withdraw(batch, request)
        self._tracker.cancelled(batch, request)
        self._dispatcher.show()
        self._tracker.deliver()

    def _free_at(self) -> tuple[float, ...]:
        pool = self._pool
        return (*([0.0] * len(pool.idle)), *[execution.ends for execution in pool.running])
