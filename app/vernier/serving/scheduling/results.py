"""What becomes of the requests of an execution that has run: answers, second attempts, failures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from vernier.border.batch import Answer
from vernier.errors import DeviceFailed, EngineError, VernierError
from vernier.metrics import ModelMetrics
from vernier.serving.monitoring.tap import AnswerTap, Shown
from vernier.serving.queueing.batcher import Batcher
from vernier.serving.queueing.span import ExecutionPart, runs
from vernier.serving.scheduling.execution import REFERENCE, Execution, rows_of
from vernier.serving.scheduling.request_tracker import RequestTracker
from vernier.tensors import Arrays

logger = logging.getLogger(__name__)


class Results:
    """Belongs to the event loop's thread.

    Args:
        runtimes: precision → runtime, for the metrics; changes with the loaded variants.

    Attributes:
        tap: is shown a share of the answered requests.
    """

    def __init__(
        self,
        name: str,
        batcher: Batcher,
        tracker: RequestTracker,
        metrics: ModelMetrics,
        runtimes: dict[str, str],
    ) -> None:
        self.tap = AnswerTap()
        self._name = name
        self._batcher = batcher
        self._tracker = tracker
        self._metrics = metrics
        self._runtimes = runtimes
        self._promised: list[tuple[float, float, int]] = []

    def settle(self, execution: Execution, now: float) -> bool:
        """Books what came of an execution; True when requests of it went back to the queue."""
        error = execution.error
        again = self._ran(execution, now) if error is None else self._failed(execution, error)
        self._has_read(execution)
        return again

    def _has_read(self, execution: Execution) -> None:
        for part in execution.parts:
            self._tracker.has_read(part.batch)

    # --- it has outputs ---------------------------------------------------------------------------
    def _ran(self, execution: Execution, now: float) -> bool:
        queue_s: list[float] = []
        shown: list[Shown] = []
        nonfinite: list[tuple[ExecutionPart, Sequence[int]]] = []
        for at, part in enumerate(execution.parts):
            span = part.span
            spoiled: Sequence[int] = execution.nonfinite.get(at, ())
            answer = self._answer(execution, part, execution.outputs[at], bool(spoiled))
            if answer is None:
                continue
            if spoiled or part.batch.deadlines is not None:
                good, late, spoiled = _told_apart(part, spoiled, now)
                if spoiled:
                    nonfinite.append((part, spoiled))
                if late:
                    self._tracker.expired(part.batch, late)
                    for run in runs(late):
                        self._book(part, run, answer.queue_s, queue_s)
            else:
                good = part.batch.state.living(span.start, span.stop)
            for run in good:
                own = (
                    answer
                    if len(run) == len(span)
                    else replace(answer, outputs=_of(part, run, answer.outputs))
                )
                self._tracker.answered(part.batch, run, own)
                self._book(part, run, answer.queue_s, queue_s)
                if self.tap.wanted:
                    shown.append((part.batch, run, own.outputs))
        self._count(execution, queue_s)
        if shown:
            self.tap.show(shown, execution.precision, now)
        return self._retry(nonfinite, execution.precision) if nonfinite else False

    def _book(self, part: ExecutionPart, requests: range, waited: float, queue_s: list[float]) -> None:
        """Requests have been answered, or were too late."""
        queue_s += [waited] * len(requests)
        state = part.batch.state
        if state.promised is not None:
            for time, count in state.promises(requests):
                self._promised.append((time, state.arrived, count))

    def _answer(
        self, execution: Execution, part: ExecutionPart, outputs: Arrays, spoiled: bool
    ) -> Answer | None:
        """The answer to all requests of a part; None when there is none (yet), or it is not wanted any more."""
        span = part.span
        answer = Answer(
            outputs,
            execution.precision,
            execution.dispatched - span.arrived,
            execution.compute_s,
            execution.rows,
        )
        gather = span.gather
        if gather is None:
            return answer
        if gather.abandoned or part.batch.state.ended[span.start]:
            return None
        if spoiled:
            return answer
        if not gather.add(part.rows, execution.compute_s, execution.rows):
            return None
        answer.outputs = gather.arrays
        answer.compute_s = gather.compute_s
        answer.batch_size = gather.batch_size
        return answer

    def _count(self, execution: Execution, queue_s: Sequence[float]) -> None:
        """queue_s: how long each request waited that the execution answers."""
        self._metrics.batch_done(
            execution.precision,
            self._runtimes[execution.precision],
            execution.rows,
            execution.bucket,
            len(queue_s),
            execution.reason,
            queue_s,
            execution.times,
            execution.predicted_s,
        )
        self._metrics.padding(*execution.elements)

    def _retry(self, nonfinite: list[tuple[ExecutionPart, Sequence[int]]], precision: str) -> bool:
        """A non-finite output of a reduced variant is never returned: FP32 computes the request anew."""
        again = REFERENCE in self._runtimes
        for (batch, span, _, _), requests in nonfinite:
            self._metrics.nonfinite_outputs(precision, len(requests))
            self._batcher.abandon(span)
            if again:
                for run in runs(requests):
                    self._batcher.again(span, batch, run, retry=REFERENCE)
            else:
                error = EngineError(
                    f"the {precision} variant gave a non-finite output, and no {REFERENCE} one is loaded"
                )
                self._tracker.failed(batch, requests, error)
        return again

    def take_promised(self) -> list[tuple[float, float, int]]:
        """Of the requests answered since the last time whose answer was predicted: by when they were to be answered,
        when they arrived, and how many they were."""
        promised = self._promised
        if promised:
            self._promised = []
        return promised

    # --- it has none ------------------------------------------------------------------------------
    def _failed(self, execution: Execution, error: VernierError) -> bool:
        """Runs the requests of a failed execution again, each alone: one bad request must not fail the others."""
        count = execution.requests
        final = count == 1 or isinstance(error, DeviceFailed)
        logger.error(
            "batch failed",
            extra={"model": self._name, "precision": execution.precision, "requests": count},
            exc_info=error,
        )
        again = False
        for batch, span, _, _ in execution.parts:
            if span.gather is not None and span.gather.abandoned:
                continue
            self._batcher.abandon(span)
            for run in batch.state.living(span.start, span.stop):
                if final or span.alone:
                    self._tracker.failed(batch, run, error)
                else:
                    again = True
                    for request in run:
                        self._batcher.again(span, batch, range(request, request + 1), alone=True)
        return again

    def lost(self, execution: Execution, error: EngineError) -> None:
        """The worker died: what it held fails, and is not tried again, since it may have been the cause."""
        self.give_up(execution, error)
        self._has_read(execution)

    def give_up(self, execution: Execution, error: VernierError) -> None:
        """Fails the requests of an execution that still runs."""
        for batch, span, _, _ in execution.parts:
            if span.gather is not None and span.gather.abandoned:
                continue
            self._batcher.abandon(span)
            for run in batch.state.living(span.start, span.stop):
                self._tracker.failed(batch, run, error)

    def overdue(self, execution: Execution, now: float) -> None:
        """Gives up the requests of a running execution whose deadline has come."""
        for batch, span, _, _ in execution.parts:
            deadlines = batch.deadlines
            if deadlines is not None:
                living = batch.state.living(span.start, span.stop)
                late = [request for run in living for request in run if deadlines[request] <= now]
                if late:
                    self._batcher.abandon(span)
                    self._tracker.expired(batch, late)
        execution.find_deadline()


def _told_apart(
    part: ExecutionPart, spoiled: Sequence[int], now: float
) -> tuple[Sequence[range], Sequence[int], Sequence[int]]:
    """Those of a part's requests that have not ended: the good ones, as runs, those that are too late, and those whose
    outputs are spoiled."""
    batch, span, _, _ = part
    good = batch.state.living(span.start, span.stop)
    deadlines = batch.deadlines
    if not spoiled and (deadlines is None or min(deadlines[span.start : span.stop]) >= now):
        return good, (), ()
    living = [request for run in good for request in run]
    anew = [request for request in living if request in spoiled]
    late = [] if deadlines is None else [r for r in living if deadlines[r] < now and r not in anew]
    return runs(r for r in living if r not in anew and r not in late), late, anew


def _of(part: ExecutionPart, requests: range, outputs: Arrays) -> Arrays:
    """What some requests of a part have of its outputs."""
    starts = part.batch.state.starts
    return rows_of(outputs, starts[requests.start] - part.start, starts[requests.stop] - part.start)
