"""Dispatch: what the batcher chooses goes to the workers, or runs here, and what comes back is booked and told.

    pump: Batcher.choose → Execution → worker (or inline) → Results.settle → RequestTracker.deliver

A pump runs after the loop has read everything that had arrived, so requests of one moment meet in one
execution. A worker wakes the loop once for each execution; the freed slot gets its next one before the
answers are delivered, so that it does not idle while responses are written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vernier.border.catalogue import SchedulerObserver
from vernier.errors import DeviceFailed, EngineError
from vernier.metrics import ModelMetrics
from vernier.serving.queueing.batcher import Batcher, Numbers
from vernier.serving.queueing.batching import Slots
from vernier.serving.queueing.request_queue import BatchQueue
from vernier.serving.queueing.sharing import DeviceScheduler
from vernier.serving.scheduling.execution import Execution
from vernier.serving.scheduling.inline import DEVICE_INDEX as INLINE_DEVICE
from vernier.serving.scheduling.inline import Inline
from vernier.serving.scheduling.request_tracker import RequestTracker
from vernier.serving.scheduling.results import Results
from vernier.serving.scheduling.worker_pool import Listener, WorkerPool

#: Waits shorter than this are polled for: the loop's timers are no finer.
_TIMER_S = 0.001
#: Inline batches of one pump together hold up the loop for about this long at most.
_INLINE_TURN_S = 0.001


class Dispatcher:
    """Belongs to the event loop's thread.

    Args:
        spawn: makes the worker pool, which reports to the listener that it is given.
        device: shares the device's workers fairly with other models; None for a device of one's own.
        clock: monotonic, in seconds.

    Attributes:
        observer: is told of the queue's room and of executions that begin.
        retry_after_s: after which the request that was refused last should come back.
        pool: the workers.
    """

    def __init__(
        self,
        batcher: Batcher,
        tracker: RequestTracker,
        results: Results,
        inline: Inline,
        spawn: Callable[[Listener], WorkerPool],
        metrics: ModelMetrics,
        clock: Callable[[], float],
        device: DeviceScheduler | None = None,
    ) -> None:
        self._batcher = batcher
        self._queue = batcher.queue
        self._tracker = tracker
        self._results = results
        self._inline = inline
        self._metrics = metrics
        self._clock = clock
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._pump_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._shown = (-1, -1)
        self.observer: SchedulerObserver | None = None
        self.retry_after_s = 1.0
        self._shown_room = -1
        self.pool = spawn(self)

    # --- the pump ---------------------------------------------------------------------------------
    def pump_soon(self) -> None:
        """Has everything done that can be, once the loop has read what has arrived."""
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def worker_idle(self) -> None:
        self.pump_soon()

    def woken(self) -> None:
        self.pump_soon()

    def _pump(self) -> None:
        """Does everything that can be done now, and sets the timer for what comes later."""
        self._pump_due = False
        now = self._clock()
        batcher, pool, device = self._batcher, self.pool, self._device
        for batch, requests in batcher.overdue(now) if self._queue.requests else ():
            self._tracker.expired(batch, requests)
        for running in pool.running:
            if running.deadline is not None and running.deadline <= now:
                self._results.overdue(running, now)
        turn_ends = now + _INLINE_TURN_S
        inline_rows = self._inline_rows if self._inline.slots else None
        late: list[Numbers] = []
        wake: float | None = None
        while True:
            choice = None
            if self._queue.requests:
                choice, wake = batcher.choose(now, self._slots, late, inline_rows)
            if choice is None:
                if device is not None:
                    device.nothing_to_run(self)
                break
            if choice.inline:
                self.run_inline(batcher.take(choice, now))
                now = self._clock()
                if now >= turn_ends:
                    self.pump_soon()
                    break
            elif device is None or device.may_run(self):
                execution = batcher.take(choice, now)
                if device is not None:
                    device.started(self, execution.predicted_s)
                if self.observer is not None:
                    self._tell_started(self.observer, execution)
                pool.run(execution)
            else:
                break
        for batch, requests in late:
            self._tracker.expired(batch, requests)
        self._set_timer(now, wake)
        self.show()
        self._tracker.deliver()
        if promised := self._results.take_promised():
            self._loop.call_soon(self._learn, promised)  # once their answers have been written

    def _learn(self, promised: list[tuple[float, float, int]]) -> None:
        self._batcher.learn(promised, self._clock())

    def run_inline(self, execution: Execution) -> None:
        """Runs it at once on this thread, and books what came of it."""
        if self.observer is not None:
            self._tell_started(self.observer, execution)
        execution.execute(self._inline.slots[execution.precision])
        self._inline.ran(execution)
        self._settle(execution, self._clock())

    @staticmethod
    def _tell_started(observer: SchedulerObserver, execution: Execution) -> None:
        for part in execution.parts:
            observer.started(part.batch)

    def _settle(self, execution: Execution, now: float) -> None:
        if execution.error is not None:
            if isinstance(execution.error, DeviceFailed) and execution.device_index == INLINE_DEVICE:
                self._inline.close()
            self.pool.failed_execution(execution.error, execution.device_index)
        if self._results.settle(execution, now):
            self.pump_soon()

    def _inline_rows(self, batch_queue: BatchQueue, now: float) -> int:
        """How many rows of the batch queue should run on this thread; 0 for none."""
        if batch_queue.precision not in self._inline.slots:
            return 0
        curve = self._batcher.curve(batch_queue.precision, batch_queue.shape)
        return self._inline.rows(batch_queue.precision, batch_queue.shape, curve, now)

    def _slots(self) -> Slots:
        pool = self.pool
        return Slots(len(pool.idle), len(pool.idle) + len(pool.busy))

    # --- out --------------------------------------------------------------------------------------
    def execution_finished(self, execution: Execution) -> None:
        now = self._clock()
        seconds = now - execution.dispatched
        self._batcher.ran(execution, seconds)
        if self._device is not None:
            self._device.ended(self, execution.predicted_s, seconds)
        self._settle(execution, now)
        self._pump()  # the slot gets its next batch first; the pump then delivers the answers

    def execution_lost(self, execution: Execution, error: EngineError) -> None:
        if self._device is not None:
            self._device.ended(self, execution.predicted_s, self._clock() - execution.dispatched)
        self._results.lost(execution, error)
        self.show()
        self._tracker.deliver()

    def device_lost(self, error: EngineError) -> None:
        for batch, requests in self._batcher.clear():
            self._tracker.failed(batch, requests, error)
        self.show()
        self._tracker.deliver()

    # --- time -------------------------------------------------------------------------------------
    def _set_timer(self, now: float, wake: float | None) -> None:
        """Wakes the pump for a batch queue that waits, and for the next deadline of what waits or runs."""
        if wake is None and not self._queue.requests and not self.pool.busy:
            return
        times = [execution.deadline for execution in self.pool.running]
        if self._queue.requests:
            times.append(self._queue.next_due())
        times.append(wake)
        at = min((t for t in times if t is not None), default=None)
        if at is None or (self._timer is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at - now < _TIMER_S:
            self.pump_soon()
        else:
            self._timer_at = at
            self._timer = self._loop.call_later(at - now, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def show(self) -> None:
        """Brings the gauges up to date."""
        pool, metrics = self.pool, self._metrics
        metrics.set_queue_depth(self._queue.requests)
        metrics.set_inflight(self._tracker.inflight)
        if self.observer is not None:
            room = self._batcher.policy.queue_limit - self._queue.rows
            if room != self._shown_room:
                self._shown_room = room
                self.observer.room(room, self.retry_after_s)
        slots = (len(pool.idle), len(pool.busy))
        if slots != self._shown:
            self._shown = slots
            metrics.set_slots(*slots, pool.failed)

    def close(self) -> None:
        """Nothing will be run any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._device is not None:
            self._device.leave(self)
