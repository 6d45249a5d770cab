"""What becomes of the requests of an execution that has run: answers, second attempts, failures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from vernier.border.batch import Answer, RequestBatch
from vernier.errors import DeviceFailed, EngineError, VernierError
from vernier.metrics import ModelMetrics
from vernier.serving.batcher import Batcher
from vernier.serving.execution import REFERENCE, Execution, rows_of
from vernier.serving.request_tracker import RequestTracker
from vernier.serving.span import Part, Span, runs
from vernier.serving.tap import AnswerTap
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
        tracker, tapped = self._tracker, self.tap.wanted
        queue_s: list[float] = []
        answered: list[tuple[RequestBatch, range, Arrays]] = []
        nonfinite: list[tuple[Span, RequestBatch, Sequence[int]]] = []
        for at, part in enumerate(execution.parts):
            batch, span, _, _ = part
            spoiled = execution.nonfinite.get(at, ())
            answer = self._answer(execution, part, execution.outputs[at], bool(spoiled))
            if answer is None:
                continue
            late: Sequence[int] = ()
            good = batch.state.living(span.start, span.stop)
            deadlines = batch.deadlines
            if spoiled or (deadlines is not None and min(deadlines[span.start : span.stop]) < now):
                living = [request for run in good for request in run]
                spoiled = [request for request in living if request in spoiled]
                if deadlines is not None:
                    late = [r for r in living if deadlines[r] < now and r not in spoiled]
                good = runs(request for request in living if request not in spoiled and request not in late)
                if spoiled:
                    nonfinite.append((span, batch, spoiled))
            for run in good:
                outputs = answer.outputs
                whole = run.start == span.start and run.stop == span.stop
                if not whole:
                    outputs = _outputs_of(part, run, outputs)
                tracker.answered(batch, run, answer if whole else replace(answer, outputs=outputs))
                if tapped:
                    answered.append((batch, run, outputs))
            if late:
                tracker.expired(batch, late)
            for run in (*good, *runs(late)):
                queue_s += [answer.queue_s] * len(run)
                for time, count in batch.state.promises(run):
                    self._promised.append((time, span.arrived, count))
        self._count(execution, queue_s)
        if answered:
            self.tap.show(answered, execution.precision, now)
        return self._retry(nonfinite, execution.precision) if nonfinite else False

    def _answer(self, execution: Execution, part: Part, outputs: Arrays, spoiled: bool) -> Answer | None:
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

    def _retry(self, spoiled: list[tuple[Span, RequestBatch, Sequence[int]]], precision: str) -> bool:
        """A non-finite output of a reduced variant is never returned: FP32 computes the request anew."""
        again = REFERENCE in self._runtimes
        for span, batch, requests in spoiled:
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


def _outputs_of(part: Part, run: range, outputs: Arrays) -> Arrays:
    """What some requests of a part have of its outputs."""
    starts = part.batch.state.starts
    return rows_of(outputs, starts[run.start] - part.start, starts[run.stop] - part.start)
