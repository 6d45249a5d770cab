"""The queue, the estimates and the policy of one model version, without clock, threads or loop.

The scheduler drives it in real time; simulation and property tests in virtual time. Whatever
is decided about requests (which run together, when, which are dropped) is decided here, but for which are let in
(`admission.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from vernier.border.batch import RequestBatch
from vernier.errors import QueueFull
from vernier.serving.queueing.admission import Admission, AdmissionRequest, FreeAt, Policy
from vernier.serving.queueing.batching import (
    IDLE,
    Decide,
    Decision,
    Dispatch,
    Limits,
    Slots,
    Waiting,
    decide,
)
from vernier.serving.queueing.latency import LatencyCurve
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.queueing.request_queue import BatchQueue, RequestQueue
from vernier.serving.queueing.span import ExecutionPart, ShapeKey, Span, alike, runs
from vernier.serving.scheduling.execution import Execution

#: Shapes with a latency curve of their own; models without sequence buckets may see any number.
_MAX_CURVES = 64

#: Requests of one batch, by their numbers.
Numbers = tuple[RequestBatch, Sequence[int]]


class Choice(NamedTuple):
    """Up to `rows` rows of a batch queue, to run now. inline: on the caller's own thread."""

    batch_queue: BatchQueue
    rows: int
    reason: str
    inline: bool


class Refused(NamedTuple):
    """Requests of a batch, by their numbers, that were not admitted, and why."""

    requests: Sequence[int]
    error: QueueFull


InlineRows = Callable[[BatchQueue, float], int]


class Batcher:
    """Belongs to one thread.

    Args:
        exact: precision → whether batches of that variant need no padding.
        curves: precision → bucket → seconds, as measured before.
        precision: the variant that requests take unless they demand another.
        decide: the policy; another one only to compare it with.
    """

    def __init__(
        self,
        layout: BatchLayout,
        exact: Mapping[str, bool],
        precision: str,
        policy: Policy,
        curves: Mapping[str, Mapping[int, float]] | None = None,
        decide: Decide = decide,
    ) -> None:
        self._decide = decide
        self.layout = layout
        self.policy = policy
        self.precision = precision
        self.queue = RequestQueue(policy.age_s, layout.largest)
        self.limits = Limits(layout.largest, policy.max_queue_delay_s, policy.objective_s)
        self.admission = Admission(policy, self.limits, self.queue)
        self.rate = self.admission.rate
        self._patience_s = policy.objective_s if policy.objective_s is not None else policy.age_s
        self._curves: dict[tuple[str, ShapeKey | None], LatencyCurve] = {}
        for name, is_exact in exact.items():
            self.learn_variant(name, is_exact, (curves or {}).get(name))

    def learn_variant(self, precision: str, exact: bool, seconds: Mapping[int, float] | None = None) -> None:
        """A variant that batches may take from now on, or a new executor of a known one."""
        exact = exact and self.layout.kind == "dynamic"
        for key in [key for key in self._curves if key[0] == precision]:
            del self._curves[key]
        self._curves[precision, None] = LatencyCurve(self.layout.buckets, exact, seconds)

    @property
    def precisions(self) -> set[str]:
        """The variants that executions may take."""
        return {precision for precision, _ in self._curves}

    def has(self, precision: str) -> bool:
        """Whether batches may take this variant."""
        return (precision, None) in self._curves

    def curve(self, precision: str, shape: ShapeKey) -> LatencyCurve:
        """The latency curve of a batch queue."""
        layout = self.layout
        key = (precision, shape if layout.dims else None)
        found = self._curves.get(key)
        if found is None:
            base = self._curves[precision, None]
            if len(self._curves) >= _MAX_CURVES:
                return base
            found = base.copy(layout.weight(shape) / layout.weight(layout.typical))
            self._curves[key] = found
        return found

    # --- in ---------------------------------------------------------------------------------------
    def admit(self, batch: RequestBatch, start: int, stop: int, now: float, free_at: FreeAt) -> list[Refused]:
        """Puts as many of the requests [start, stop) of a batch into the queue as may wait; none is late by now.

        Args:
            free_at: when each slot should be free.

        Returns the others, and why: too many wait, or they could not be answered in time.
        """
        state = batch.state
        precision = batch.precision or self.precision
        state.shape = self.layout.shape_key(batch.inputs)
        curve = self.curve(precision, state.shape)
        refused: list[Refused] = []
        for first, end in alike(batch, start, stop, self.layout.largest, now):
            deadline = None if batch.deadlines is None else min(batch.deadlines[first:end])
            wanted = AdmissionRequest(batch.rows[first:end], batch.priority, deadline)
            admitted, promised, refusal = self.admission.judge(wanted, curve, now, free_at)
            for run in admitted:
                requests = range(first + run.start, first + run.stop)
                if promised is not None:
                    state.promise(requests, promised[run.start : run.stop])
                self._push(self._span(batch, requests, now + self._patience_s))
            if refusal is not None:
                let_in = {first + number for run in admitted for number in run}
                others = (
                    [number for number in range(first, end) if number not in let_in]
                    if let_in
                    else range(first, end)
                )
                refused.append(Refused(others, refusal))
        return refused

    def _span(self, batch: RequestBatch, requests: range, due: float) -> Span:
        return Span(batch, requests.start, requests.stop, due, self.layout.largest)

    def _push(self, span: Span) -> None:
        batch = span.batch
        precision = span.retry or batch.precision or self.precision
        self.queue.push(span, (precision, batch.state.shape, span.alone))

    def refusal(
        self,
        precision: str | None,
        priority: int,
        deadline: float | None,
        now: float,
        free_at: FreeAt,
    ) -> QueueFull | None:
        """Why a request that has not been read would be refused, had it one row; None when that depends on its shape,
        and when it would be admitted."""
        if self.layout.dims:
            return None
        wanted = AdmissionRequest((1,), priority, deadline)
        return self.admission.refusal(wanted, self.curve(precision or self.precision, ()), now, free_at)

    def learn(self, promised: Iterable[tuple[float, float, int]], now: float) -> None:
        """Learns from answers whether their predictions were right; see `Results.take_promised`."""
        for time, arrived, count in promised:
            self.admission.answered(time, arrived, now, count)

    def again(
        self,
        span: Span,
        batch: RequestBatch,
        requests: range,
        *,
        alone: bool = False,
        retry: str | None = None,
    ) -> None:
        """Puts back requests of a span that ran, to be computed anew; they keep their arrival and due time."""
        made = self._span(batch, requests, span.due)
        made.alone = span.alone or alone
        made.retry = span.retry or retry
        self._push(made)

    # --- out --------------------------------------------------------------------------------------
    def withdraw(self, batch: RequestBatch, request: int) -> None:
        """Takes a request out of the queue, if it waits there; what runs of it counts no more."""
        for span in batch.state.waiting:
            if span.start <= request < span.stop:
                if span.gather is not None:
                    span.gather.abandoned = True
                self.queue.withdraw(span, request)
                return

    def abandon(self, span: Span) -> None:
        """The request of a span that runs is not computed further, if it is one that is run in several executions:
        what waits of it leaves the queue, and what runs of it counts no more. Nothing happens to other spans."""
        if span.gather is not None:
            span.gather.abandoned = True
            if span.key is not None:
                self.queue.remove(span)

    def clear(self) -> list[Numbers]:
        """Takes everything out of the queue."""
        taken: list[Numbers] = []
        for span in list(self.queue):
            taken.append((span.batch, range(span.start, span.stop)))
            self._remove(span)
        return taken

    def overdue(self, now: float) -> list[Numbers]:
        """Takes the waiting requests whose deadline has come out of the queue."""
        late: list[Numbers] = []
        for span in self.queue.overdue(now):
            batch, deadlines, requests = span.batch, span.batch.deadlines, range(span.start, span.stop)
            assert deadlines is not None
            if max(deadlines[span.start : span.stop]) <= now:
                late.append((batch, requests))
                self._remove(span)
                continue
            gone = [request for request in requests if deadlines[request] <= now]
            if gone:
                late.append((batch, gone))
            self._push_anew(span, runs(request for request in requests if deadlines[request] > now))
        return late

    def _push_anew(self, span: Span, kept: Iterable[range]) -> None:
        """These requests of a waiting span leave their place, and wait where they would as newcomers of their age."""
        made = [span.part(run.start, run.stop, self.layout.largest) for run in kept]
        self.queue.remove(span)
        for part in made:
            self._push(part)

    def _remove(self, span: Span) -> None:
        if span.gather is not None:
            span.gather.abandoned = True
        self.queue.remove(span)

    def choose(
        self,
        now: float,
        slots: Callable[[], Slots],
        late: list[Numbers],
        inline_rows: InlineRows | None = None,
    ) -> tuple[Choice | None, float | None]:
        """What should run next, if anything should run now.

        Args:
            slots: tells of the slots; asked only when nothing can run inline.
            late: gets the requests that cannot meet their deadline any more; they are out of the queue.
            inline_rows: how many rows of a batch queue the caller would run on its own thread, needing no slot.

        Returns:
            The choice, or None; and when a batch queue that waits for more wants to be asked again, or None.
        """
        wake: float | None = None
        known: Slots | None = None
        for batch_queue in self.queue.by_urgency(now):
            self._drop_hopeless(batch_queue, now, late)
            if inline_rows is not None:
                rows = inline_rows(batch_queue, now)
                if rows and self._head_rows(batch_queue, now) <= rows:
                    return Choice(batch_queue, rows, IDLE, True), None
            known = known or slots()
            if known.idle:
                decision = self._decide_on(batch_queue, now, known)
                if isinstance(decision, Dispatch):
                    return Choice(batch_queue, decision.rows, decision.reason, False), None
                wake = decision.until if wake is None else min(wake, decision.until)
        return None, wake

    def _drop_hopeless(self, batch_queue: BatchQueue, now: float, late: list[Numbers]) -> None:
        """Takes out what would go first but cannot meet its deadline any more, while others wait behind it."""
        curve = self.curve(batch_queue.precision, batch_queue.shape)
        while batch_queue.requests > 1:
            head = self.queue.head(batch_queue, now)
            if head.deadline is None or head.taken:
                return
            batch, request = head.batch, head.most_urgent()
            rows = min(batch.rows[request], self.layout.largest)
            if now + curve.seconds(rows) <= head.deadline:
                return
            self.withdraw(batch, request)
            late.append((batch, (request,)))

    def _needs(self, span: Span) -> int:
        """Rows that the first request of a span needs in one execution."""
        return min(span.batch.rows[span.start] - span.taken, self.layout.largest)

    def _decide_on(self, batch_queue: BatchQueue, now: float, slots: Slots) -> Decision:
        if batch_queue.alone:
            return Dispatch(self.layout.largest, IDLE)
        head = self.queue.head(batch_queue, now)
        due = head.deadline
        if due is None and self.policy.objective_s is not None:
            due = head.due
        waiting = Waiting(batch_queue.rows, self._needs(head), batch_queue.oldest(), due)
        curve = self.curve(batch_queue.precision, batch_queue.shape)
        return self._decide(waiting, now, slots, curve, self.rate.per_second(now), self.limits)

    def _head_rows(self, batch_queue: BatchQueue, now: float) -> int:
        """Rows that the batch queue's next request needs in one execution."""
        return self._needs(self.queue.head(batch_queue, now))

    def predicted_s(self, choice: Choice) -> float:
        """How long the choice should take a slot."""
        batch_queue = choice.batch_queue
        return self.curve(batch_queue.precision, batch_queue.shape).seconds(
            min(choice.rows, batch_queue.rows)
        )

    def take(self, choice: Choice, now: float) -> Execution:
        """Takes the chosen requests out of the queue."""
        batch_queue, room, reason, _ = choice
        return self._execution(
            batch_queue.precision, batch_queue.shape, self.queue.take(batch_queue, room, now), reason, now
        )

    def take_at_once(self, batch: RequestBatch, requests: range, now: float) -> Execution:
        """Requests that have not been queued, as an execution: they have not more rows than the largest."""
        state = batch.state
        state.shape = self.layout.shape_key(batch.inputs)
        span = self._span(batch, requests, now + self._patience_s)
        self.rate.add(span.rows)
        parts = [ExecutionPart(batch, span, span.first, span.rows)]
        return self._execution(batch.precision or self.precision, state.shape, parts, IDLE, now)

    def _execution(
        self, precision: str, shape: ShapeKey, parts: list[ExecutionPart], reason: str, now: float
    ) -> Execution:
        rows = 0
        for part in parts:
            rows += part.rows
        curve = self.curve(precision, shape)
        return Execution(
            self.layout, precision, shape, parts, rows, curve.bucket(rows), reason, curve.seconds(rows), now
        )

    def ran(self, execution: Execution, seconds: float) -> None:
        """Learns how long a slot was taken by an execution."""
        self.curve(execution.precision, execution.shape).observe(execution.rows, seconds)

    # --- variants ---------------------------------------------------------------------------------
    def set_precision(self, precision: str) -> None:
        """New executions take this variant; requests that demanded one keep theirs."""
        self.precision = precision
        for span in list(self.queue):
            assert span.key is not None
            free = span.batch.precision is None and span.retry is None
            if free and span.key[0] != precision and not span.taken:
                self._push_anew(span, [range(span.start, span.stop)])
