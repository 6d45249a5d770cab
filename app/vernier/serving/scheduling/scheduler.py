"""The shell around the batching policy: one per loaded model version, all of its state on the loop's thread.

    submit → Entrance → Batcher.admit → queue → Dispatcher → RequestTracker → the batch's target

Here are the variants, and start and end; the entrance decides which requests come in, the dispatcher which run when.
Every request ends exactly once: refused, or when it was admitted answered, failed, expired or cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from vernier.border.awaited import AwaitedAnswer
from vernier.border.batch import Answer, RequestBatch
from vernier.border.catalogue import SchedulerObserver
from vernier.engine.base import Executor
from vernier.engine.pool import OpenSlots
from vernier.errors import Draining, VernierError
from vernier.metrics import ModelMetrics
from vernier.serving.monitoring.tap import Tap
from vernier.serving.queueing.admission import Policy
from vernier.serving.queueing.batcher import Batcher
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.queueing.sharing import DeviceScheduler
from vernier.serving.scheduling.dispatcher import Dispatcher
from vernier.serving.scheduling.entrance import Entrance
from vernier.serving.scheduling.inline import Inline
from vernier.serving.scheduling.request_tracker import RequestTracker
from vernier.serving.scheduling.results import Results
from vernier.serving.scheduling.warmup import probe, warm_up
from vernier.serving.scheduling.worker_pool import Curves, Listener, WorkerPool
from vernier.tensors import Arrays

__all__ = ["Answer", "Policy", "Scheduler", "Tap"]

logger = logging.getLogger(__name__)


class Scheduler:
    """Queues, batches and runs the predictions of one model version.

    Args:
        name: for messages and logs.
        executors: by precision.
        precision: the variant that new batches take.
        slots: workers; each has a slot of every variant, all on one of the devices that the executors span.
        curves: precision → bucket → seconds measured before, perhaps on another machine; what is measured at
            start wins, and scales the rest.
        device: shares the device's workers fairly with other models; None for a device of one's own.
        clock: monotonic, in seconds; the deadlines of requests are on it.
        inline: run batches that are quicker than a hand-over on the loop's own thread.
        at_once: run them within `submit` where nothing waits; else at the end of the loop's turn, together with what
            else has come in it, as suits a process that several fronts send batches to. Large ones run in `submit` all
            the same, since they are read where they lie only when they run alone.

    Must be made on the event loop's thread. `started` must be awaited before traffic is sent.
    """

    def __init__(
        self,
        name: str,
        layout: BatchLayout,
        executors: Mapping[str, Executor],
        precision: str,
        policy: Policy,
        slots: int,
        metrics: ModelMetrics,
        *,
        curves: Mapping[str, Mapping[int, float]] | None = None,
        device: DeviceScheduler | None = None,
        clock: Callable[[], float] | None = None,
        inline: bool = True,
        at_once: bool = True,
    ) -> None:
        self.name = name
        self._layout = layout
        self._executors = dict(executors)
        self._runtimes = {p: executor.runtime for p, executor in executors.items()}
        self._metrics = metrics
        loop = asyncio.get_running_loop()
        self._clock = clock or loop.time
        exact = {p: executor.exact_batch for p, executor in executors.items()}
        self._batcher = Batcher(layout, exact, precision, policy, curves)
        self._queue = self._batcher.queue
        self._tracker = RequestTracker(metrics, loop.call_exception_handler)
        self._results = Results(name, self._batcher, self._tracker, metrics, self._runtimes)
        self._expected = dict(curves or {})
        self._inline = Inline()
        self._inline_allowed = inline

        def spawn(listener: Listener) -> WorkerPool:
            return WorkerPool(name, executors, slots, listener, self._warm_up, self._probe)

        self._dispatcher = Dispatcher(
            self._batcher,
            self._tracker,
            self._results,
            self._inline,
            spawn,
            metrics,
            self._clock,
            device,
        )
        self._pool = self._dispatcher.pool
        self._entrance = Entrance(
            name,
            self._batcher,
            self._tracker,
            self._inline,
            self._dispatcher,
            metrics,
            self._clock,
            at_once,
        )
        metrics.set_latency_objective(policy.objective_s)
        metrics.precision_active(precision, self._runtimes[precision])

    def _warm_up(self, slots: OpenSlots) -> Curves:
        return warm_up(slots, self._layout, self._expected)

    def _probe(self, slots: OpenSlots) -> None:
        probe(slots[self._batcher.precision], self._layout)

    async def started(self) -> None:
        """Returns when the workers are open and measured. Raises EngineError when no slot can be opened."""
        await self._pool.opened()
        batcher = self._batcher
        hand_over = await self._pool.hand_over_s()
        self._inline.set_hand_over(hand_over)
        for precision, executor in self._executors.items():
            measured = self._pool.curves.get(precision)
            if measured:
                batcher.learn_variant(precision, executor.exact_batch, measured)
        for precision, executor in self._executors.items():
            await self._open_inline(precision, executor)
        self._dispatcher.show()
        logger.info(
            "scheduler started",
            extra={
                "model": self.name,
                "slots": self._pool.size - self._pool.failed,
                "hand_over_us": round(1e6 * hand_over),
                "inline": sorted(self._inline.slots),
            },
        )

    async def _open_inline(self, precision: str, executor: Executor) -> None:
        """A slot for the loop's own thread, where the variant is quick enough for it."""
        curve = self._batcher.curve(precision, self._layout.typical)
        if not self._inline_allowed or not self._inline.worth_having(curve):
            return
        slot = await asyncio.to_thread(executor.open_slot)
        await asyncio.to_thread(warm_up, {precision: slot}, self._layout, self._expected)
        self._inline.use(precision, slot)

    # --- what others see --------------------------------------------------------------------------
    @property
    def precision(self) -> str:
        """The variant that new batches take."""
        return self._batcher.precision

    @property
    def outputs(self) -> Sequence[str]:
        """Names of all outputs of the model."""
        return self._layout.outputs

    @property
    def fault(self) -> str | None:
        """Why this model should get no traffic, in words; None when all is well."""
        return self._pool.fault

    @property
    def inflight(self) -> int:
        """Requests that were admitted and have not ended."""
        return self._tracker.inflight

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._queue.requests

    def set_precision(self, precision: str) -> None:
        """New batches take this variant, in one step; what runs finishes as it is. KeyError when not loaded."""
        runtime = self._runtimes[precision]
        self._batcher.set_precision(precision)
        self._metrics.precision_active(precision, runtime)
        self._dispatcher.pump_soon()

    async def install(self, executor: Executor, curve: Mapping[int, float] | None = None) -> None:
        """Adds a variant, or replaces its executor, under traffic. The old executor is not used afterwards.

        Args:
            curve: bucket → seconds as measured before, if known.

        Raises EngineError when a slot cannot be opened; nothing has changed then.
        """
        await self._pool.install(executor)
        precision = executor.precision
        self._executors[precision] = executor
        self._runtimes[precision] = executor.runtime
        self._expected[precision] = dict(curve or {})
        self._inline.drop(precision)
        self._batcher.learn_variant(precision, executor.exact_batch, curve)
        await self._open_inline(precision, executor)
        if precision == self.precision:
            self._metrics.precision_active(precision, executor.runtime)

    def watch(self, observer: SchedulerObserver) -> None:
        """Tells the observer of the queue's room, now and whenever it changes, and of executions that begin."""
        self._dispatcher.observer = observer
        self._dispatcher.show()

    def set_tap(self, tap: Tap | None, share: float = 0.0, quiet_s: float = float("inf")) -> None:
        """Shows `tap` a random share of the answered requests, and one whenever it saw none for `quiet_s`; what it gets
        are copies."""
        self._results.tap.set(tap, share, quiet_s)

    # --- in ---------------------------------------------------------------------------------------
    def submit(self, batch: RequestBatch) -> None:
        """Takes a batch of at least one request; its target is told how each ends, of some perhaps before this returns.

        In this order: nothing is admitted while the model is taken out of service, when it cannot run any more, or for
        a variant that is not loaded (Draining, NotReady, UnsupportedPrecision); requests whose deadline has passed fail
        (DeadlineExceeded); requests in front run at once on this thread, where that is quick and nothing waits before
        them; of the others those are queued that may wait, the rest is refused (QueueFull).
        """
        self._entrance.submit(batch)

    def cancel(self, batch: RequestBatch, request: int) -> None:
        """Ends a request of a batch without telling the target, but for `released`, which may be called before this
        returns. Nothing happens when the request has ended, or was not submitted."""
        self._entrance.cancel(batch, request)

    def refusal(
        self, precision: str | None = None, priority: int = 0, deadline: float | None = None
    ) -> VernierError | None:
        """Why a request that has not been read yet would be refused, had it one row; None when it would be admitted.

        So that reading costs nothing under overload. A caller that refuses the request for it calls `refused`.
        """
        return self._entrance.refusal(precision, priority, deadline)

    def refused(self, error: VernierError, count: int = 1, rows: int = 1) -> None:
        """Counts `count` requests of `rows` rows each that were refused for what `refusal` said."""
        self._entrance.refused(error, count, rows)

    async def predict(
        self,
        inputs: Arrays,
        *,
        rows: int,
        outputs: Sequence[str] | None = None,
        precision: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Answer:
        """`submit` of one request for coroutines; cancelling the task cancels the request. Raises what it ended with.

        Args:
            outputs: names of the wanted ones; None for all.
        """
        awaited = AwaitedAnswer()
        batch = RequestBatch(
            inputs,
            (rows,),
            self._layout.outputs if outputs is None else outputs,
            precision,
            priority,
            (self._clock(),),
            None if deadline is None else (deadline,),
            awaited,
        )
        self.submit(batch)
        try:
            await asyncio.sleep(
                0
            )  # the answer may be there already: without it calls in a row would keep the loop
            return await awaited.future
        except asyncio.CancelledError:
            self.cancel(batch, 0)
            raise

    # --- end --------------------------------------------------------------------------------------
    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests, waits for the admitted ones, fails what is left after the timeout, frees all."""
        self._entrance.draining = True
        ends = self._clock() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._tracker.empty.wait()
        except TimeoutError:
            self._fail_rest()
        await self._pool.close(max(0.1, ends - self._clock()))
        self._dispatcher.close()
        self._inline.close()
        self._dispatcher.show()

    def _fail_rest(self) -> None:
        logger.error("drain ran out of time", extra={"model": self.name, "inflight": self.inflight})
        error = Draining("the service stopped before the request could run; send it to another instance")
        for batch, requests in self._batcher.clear():
            self._tracker.failed(batch, requests, error)
        for execution in self._pool.running:
            self._results.give_up(execution, error)
        self._tracker.deliver()
