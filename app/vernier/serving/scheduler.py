"""The shell around the batching policy: one per loaded model version, all of its state on the loop's thread.

    submit → Batcher.admit → queue → Dispatcher → done

Here are the entrance, the variants, and start and end; what runs when is the dispatcher's. Every admitted request
ends exactly once: answered, failed, expired or cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from vernier.border.batch import Answer, RequestBatch
from vernier.engine.base import Executor
from vernier.engine.pool import Slots as OpenSlots
from vernier.errors import Draining, NotReady, QueueFull, VernierError
from vernier.metrics import ModelMetrics
from vernier.serving import batch_adapter
from vernier.serving.admission import Policy
from vernier.serving.batcher import Batcher
from vernier.serving.batching import IDLE
from vernier.serving.deference import Deference
from vernier.serving.dispatcher import Dispatcher
from vernier.serving.execution import Batch
from vernier.serving.inline import Inline
from vernier.serving.ledger import Ledger
from vernier.serving.padding import BatchLayout
from vernier.serving.request import AwaitedRequest, JoinedRequests, PendingRequest, RequestGroup
from vernier.serving.request_queue import Lane
from vernier.serving.results import Results, Tap
from vernier.serving.sharing import Device
from vernier.serving.warmup import probe, warm_up
from vernier.serving.workers import Crew, Curves, Listener
from vernier.tensors import Arrays

__all__ = ["Answer", "PendingRequest", "Policy", "Scheduler", "Tap"]

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
        deference: of the loop's thread to the workers, shared by all models.
        clock: monotonic, in seconds; the deadlines of requests are on it.
        inline: run batches that are quicker than a hand-over on the loop's own thread.

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
        device: Device | None = None,
        deference: Deference | None = None,
        clock: Callable[[], float] | None = None,
        inline: bool = True,
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
        self._ledger = Ledger(self._batcher, metrics, loop.call_exception_handler)
        self._results = Results(name, self._batcher, self._ledger, metrics, self._runtimes)
        self._expected = dict(curves or {})
        self._inline = Inline()
        self._inline_allowed = inline
        self._deference = deference
        if deference is not None:
            deference.join(self, policy.objective_s)

        def hire(listener: Listener) -> Crew:
            return Crew(name, executors, slots, listener, self._warm_up, self._probe)

        self._dispatcher = Dispatcher(
            self._batcher,
            self._ledger,
            self._results,
            self._inline,
            hire,
            metrics,
            self._clock,
            device,
            deference,
        )
        self._crew = self._dispatcher.crew
        self._draining = False
        metrics.set_latency_objective(policy.objective_s)
        metrics.precision_active(precision, self._runtimes[precision])

    def _warm_up(self, slots: OpenSlots) -> Curves:
        return warm_up(slots, self._layout, self._expected)

    def _probe(self, slots: OpenSlots) -> None:
        probe(slots[self._batcher.precision], self._layout)

    async def started(self) -> None:
        """Returns when the workers are open and measured. Raises EngineError when no slot can be opened."""
        await self._crew.opened()
        batcher = self._batcher
        hand_over = await self._crew.hand_over_s()
        self._inline.set_hand_over(hand_over)
        for precision, executor in self._executors.items():
            measured = self._crew.curves.get(precision)
            if measured:
                batcher.learn_variant(precision, executor.exact_batch, measured)
        for precision, executor in self._executors.items():
            await self._open_inline(precision, executor)
        self._dispatcher.show()
        logger.info(
            "scheduler started",
            extra={
                "model": self.name,
                "slots": self._crew.size - self._crew.failed,
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
    def fault(self) -> str | None:
        """Why this model should get no traffic, in words; None when all is well."""
        return self._crew.fault

    @property
    def inflight(self) -> int:
        """Requests that were admitted and have not ended."""
        return self._ledger.inflight

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
        await self._crew.install(executor)
        precision = executor.precision
        self._executors[precision] = executor
        self._runtimes[precision] = executor.runtime
        self._expected[precision] = dict(curve or {})
        self._inline.drop(precision)
        self._batcher.learn_variant(precision, executor.exact_batch, curve)
        await self._open_inline(precision, executor)
        if precision == self.precision:
            self._metrics.precision_active(precision, executor.runtime)

    def set_tap(self, tap: Tap | None, share: float = 0.0, quiet_s: float = float("inf")) -> None:
        """Shows `tap` a random share of the answered requests, and one whenever it saw none for `quiet_s`."""
        self._results.set_tap(tap, share, quiet_s)

    # --- in ---------------------------------------------------------------------------------------
    @property
    def largest_grouped(self) -> int:
        """The most rows of a request that can be in a group; 0 for none."""
        return self._layout.largest if self._layout.kind == "dynamic" else 0

    def submit(self, batch: RequestBatch) -> None:
        """See vernier.border."""
        batch_adapter.submit(self, batch)

    def cancel(self, batch: RequestBatch, index: int) -> None:
        batch_adapter.cancel(self, batch, index)

    def admit(self, request: PendingRequest) -> VernierError | None:
        """Admits the request, whose `done` will then be called once, unless it is cancelled.

        Of a group those that can be are admitted; the others are not in it any more.

        Returns Draining, NotReady or QueueFull when it was not queued, or others of the group were not.
        """
        group = request if isinstance(request, RequestGroup) else None
        count = request.count
        if self._draining or self._crew.gone is not None:
            if group is not None:
                group.keep(())
            fault = self._closed()
            self.refused(fault, count)
            return fault
        now = self._clock()
        refusal = self._batcher.admit(request, now, self._free_at, self._earliest(now))
        admitted = 0 if refusal is not None and group is None else request.count
        if admitted:
            self._ledger.admitted(admitted)
            if self._crew.idle or self._inline.slots or request.deadline is not None:
                self._dispatcher.pump_soon()
        if refusal is not None:
            self._count_refused(refusal, count - admitted, now)
        return refusal

    def refusal(
        self, precision: str | None = None, priority: int = 0, deadline: float | None = None
    ) -> VernierError | None:
        """Why a request that has not been read yet would be refused, had it one row; None when it would be admitted.

        So that reading costs nothing under overload. Whoever heeds it calls `refused`.
        """
        if self._draining or self._crew.gone is not None:
            return self._closed()
        if self._crew.idle and not self._queue.requests:
            return None  # it would start at once; the batcher says so too, but takes longer
        now = self._clock()
        return self._batcher.refusal(precision, priority, deadline, now, self._free_at, self._earliest(now))

    def refused(self, error: VernierError, count: int = 1, rows: int = 1) -> None:
        """Counts requests of `rows` rows each that were refused for what `refusal` said."""
        if isinstance(error, QueueFull):
            self._batcher.rate.add(count * rows)
            self._count_refused(error, count, self._clock())
        else:
            self._metrics.rejected(error.code, count)

    def _count_refused(self, error: QueueFull, count: int, now: float) -> None:
        self._metrics.rejected(error.reason, count)
        if self._deference is not None and self._crew.busy:
            self._deference.refused(now)

    def _earliest(self, now: float) -> float:
        return now if self._deference is None else self._deference.earliest(now)

    def _closed(self) -> VernierError:
        """Why nothing is admitted any more."""
        if self._draining:
            return Draining(f"model '{self.name}' is being taken out of service; send the request again")
        return NotReady(f"model '{self.name}' cannot run any more; send the request to another instance")

    def room_for_joined(self, precision: str | None = None) -> int:
        """The most rows that `run_joined` takes now; 0 for none."""
        layout = self._layout
        if self._queue.requests or self._draining or self._crew.gone is not None:
            return 0
        if layout.kind != "dynamic" or layout.dims:
            return 0
        precision = precision or self._batcher.precision
        return self._inline.room(precision, (), self._batcher.curve(precision, ()))

    def run_joined(self, joined: JoinedRequests) -> Answer | None:
        """Runs requests that are joined into one of all their rows at once on this thread.

        None, with nothing done or counted, when that cannot be: something waits before them, they are no batch
        that is quick enough, or what came of it must be looked at request by request. Then submit each.
        """
        layout, rows = self._layout, joined.rows
        if rows > self.room_for_joined(joined.precision):
            return None
        precision = joined.precision or self._batcher.precision
        lane = Lane((precision, (), False))
        curve = self._batcher.curve(precision, lane.shape)
        now, bucket, seconds = self._clock(), curve.bucket(rows), curve.seconds(rows)
        batch = Batch(layout, lane, [(joined, 0, rows, 0)], rows, bucket, IDLE, seconds, now)
        batch.execute(self._inline.slots[precision])
        answer = self._results.settle_joined(batch, joined, now)
        if answer is not None:
            self._inline.ran(batch)
            self._batcher.rate.add(rows)
        return answer

    def _cancel(self, request: PendingRequest) -> None:
        """Ends the request without an answer; `done` is not called. Nothing happens when it has ended."""
        self._batcher.single_out(request)
        if self._ledger.cancelled(request):
            self._dispatcher.show()

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
        """`submit` for coroutines; cancelling the task cancels the request. Raises what it ended with."""
        request = AwaitedRequest(inputs, rows, outputs, precision, priority, deadline)
        error = self.admit(request)
        if error is not None:
            raise error
        try:
            return await request.future
        except asyncio.CancelledError:
            self._cancel(request)
            raise

    def _free_at(self) -> tuple[float, ...]:
        crew = self._crew
        return (*([0.0] * len(crew.idle)), *[batch.ends for batch in crew.running])

    # --- end --------------------------------------------------------------------------------------
    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests, waits for the admitted ones, fails what is left after the timeout, frees all."""
        self._draining = True
        ends = self._clock() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._ledger.empty.wait()
        except TimeoutError:
            self._fail_rest()
        await self._crew.close(max(0.1, ends - self._clock()))
        self._dispatcher.close()
        if self._deference is not None:
            self._deference.leave(self)
        self._inline.close()
        self._dispatcher.show()

    def _fail_rest(self) -> None:
        logger.error("drain ran out of time", extra={"model": self.name, "inflight": self.inflight})
        error = Draining("the service stopped before the request could run; send it to another instance")
        for request in [*self._queue, *[part[0] for batch in self._crew.running for part in batch.parts]]:
            self._ledger.failed(request, error)
        self._ledger.deliver()
