"""What becomes of the requests of a batch that has run: answers, second attempts, failures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from random import Random

from vernier.errors import DeviceFailed, EngineError, VernierError
from vernier.metrics import ModelMetrics
from vernier.serving.batcher import Batcher
from vernier.serving.execution import REFERENCE, Batch, finite
from vernier.serving.ledger import Ledger
from vernier.serving.padding import Part
from vernier.serving.request import ENDED, Answer, JoinedRequests, PendingRequest, RequestGroup, cut
from vernier.tensors import Arrays

logger = logging.getLogger(__name__)

#: Gets inputs, outputs and precision of a sampled answered request, on the loop's thread: it must only enqueue.
Tap = Callable[[Arrays, Arrays, str], None]


class Results:
    """Belongs to the event loop's thread.

    Args:
        runtimes: precision → runtime, for the metrics; changes with the loaded variants.
    """

    def __init__(
        self,
        name: str,
        batcher: Batcher,
        ledger: Ledger,
        metrics: ModelMetrics,
        runtimes: dict[str, str],
    ) -> None:
        self._name = name
        self._batcher = batcher
        self._ledger = ledger
        self._metrics = metrics
        self._runtimes = runtimes
        self._tap: Tap | None = None
        self._tap_share = 0.0
        self._tap_quiet_s = float("inf")
        self._tap_owed = 0.0
        self._shown = 0.0
        self._random = Random(0)
        self._promised: list[PendingRequest] = []

    def set_tap(self, tap: Tap | None, share: float, quiet_s: float) -> None:
        """See `Scheduler.set_tap`."""
        self._tap, self._tap_share, self._tap_quiet_s, self._tap_owed = tap, share, quiet_s, 0.0

    def settle(self, batch: Batch, now: float) -> bool:
        """Books what came of a batch; True when requests of it went back to the queue."""
        if batch.error is not None:
            return self._failed(batch, batch.error, now)
        answers: list[tuple[PendingRequest, Answer]] = []
        late: list[PendingRequest] = []
        rescued: list[PendingRequest] = []
        dispatched, precision = batch.dispatched, batch.precision
        compute_s, rows = batch.compute_s, batch.rows
        queue_s: list[float] = []
        answered = 0
        for (request, _, count, attempt), outputs in _each(batch, now):
            if request.state == ENDED or request.attempt != attempt:
                continue
            if outputs is None:
                rescued.append(request)
                continue
            waited = dispatched - request.arrived
            answer = Answer(outputs, precision, waited, compute_s, rows)
            if request.gather is not None and not _gathered(request, count, answer):
                continue
            queue_s += [waited] * request.count
            if request.promised is not None:
                self._promised.append(request)
            if request.deadline is not None and now > request.deadline:
                late.append(request)
            else:
                answers.append((request, answer))
                answered += request.count
        self._ledger.answered(answers)
        for request in late:
            self._ledger.expired(request)
        self._count(batch, queue_s)
        if self._tap is not None and answered:
            chosen = self._chosen(answered, now)
            if chosen:
                self._show_all(answers, chosen)
        return self._rescue(rescued, precision, now) if rescued else False

    def _show_all(self, answers: Sequence[tuple[PendingRequest, Answer]], chosen: Sequence[int]) -> None:
        """Shows the tap those of the answered requests that have these numbers."""
        assert self._tap is not None
        numbers = sorted(chosen, reverse=True)
        first = 0
        for request, answer in answers:
            after = first + request.count
            while numbers and numbers[-1] < after:
                at = numbers.pop() - first
                if isinstance(request, RequestGroup):
                    self._show_one(request, request.places()[at], answer.outputs, answer.precision)
                else:
                    self._tap(request.inputs, answer.outputs, answer.precision)
            first = after

    def _show_one(self, joined: JoinedRequests, at: int, outputs: Arrays, precision: str) -> None:
        """Shows the tap one of joined requests."""
        assert self._tap is not None
        mine = joined.rows_of(at)
        # copied: what the tap keeps must not keep the memory of all of them
        inputs = {name: array[mine].copy() for name, array in joined.inputs.items()}
        self._tap(inputs, {name: array[mine] for name, array in outputs.items()}, precision)

    def take_promised(self) -> list[PendingRequest]:
        """Requests answered since the last time for which there was a prediction."""
        promised = self._promised
        if promised:
            self._promised = []
        return promised

    def settle_joined(self, batch: Batch, joined: JoinedRequests, now: float) -> Answer | None:
        """Books a batch of these only; None, with nothing booked, when it must be computed request by request."""
        outputs = batch.outputs[0] if batch.error is None else None
        if outputs is None:
            return None
        precision, rows = batch.precision, batch.rows
        count = len(joined.each)
        self._ledger.passed(count)
        self._count(batch, [0.0] * count)
        if self._tap is not None:
            for at in self._chosen(count, now):
                self._show_one(joined, at, outputs, precision)
        return Answer(outputs, precision, 0.0, batch.compute_s, rows)

    def _count(self, batch: Batch, queue_s: Sequence[float]) -> None:
        """queue_s: how long each request waited that the batch answers."""
        self._metrics.batch_done(
            batch.precision,
            self._runtimes[batch.precision],
            batch.rows,
            batch.bucket,
            len(queue_s),
            batch.reason,
            queue_s,
            batch.times,
            batch.predicted_s,
        )
        self._metrics.padding(*batch.elements)

    def _rescue(self, requests: list[PendingRequest], precision: str, now: float) -> bool:
        """A non-finite output of a reduced variant is never returned: FP32 computes the request anew."""
        again = False
        self._metrics.nonfinite_outputs(precision, len(requests))
        for request in requests:
            if REFERENCE in self._runtimes:
                request.rescue = REFERENCE
                self._batcher.again(request, now)
                again = True
            else:
                self._ledger.failed(
                    request,
                    EngineError(
                        f"the {precision} variant gave a non-finite output, and no {REFERENCE} one is loaded"
                    ),
                )
        return again

    def _failed(self, batch: Batch, error: VernierError, now: float) -> bool:
        """Runs the requests of a failed batch again, each alone: one bad request must not fail the others."""
        asked = [part[0] for part in batch.parts]
        count = sum(len(one.each) if isinstance(one, RequestGroup) else 1 for one in asked)
        alone = count == 1 or isinstance(error, DeviceFailed)
        logger.error(
            "batch failed",
            extra={"model": self._name, "precision": batch.precision, "requests": count},
            exc_info=error,
        )
        again = False
        for request, _, _, attempt in batch.parts if alone else batch.each():
            if request.state == ENDED or request.attempt != attempt:
                continue
            if alone or request.alone:
                self._ledger.failed(request, error)
            else:
                request.alone = True
                self._batcher.again(request, now)
                again = True
        return again

    def lost(self, batch: Batch, error: EngineError) -> None:
        """The worker died: what it held fails, and is not tried again, since it may have been the cause."""
        for request, _, _, attempt in batch.parts:
            if request.attempt == attempt:
                self._ledger.failed(request, error)

    def overdue(self, batch: Batch, now: float) -> None:
        """Gives up the requests of a running batch whose deadline has come."""
        for request, _, _, attempt in batch.parts:
            if request.attempt == attempt and request.deadline is not None and request.deadline <= now:
                late = request.release_overdue(now) if isinstance(request, RequestGroup) else [request]
                for one in late:
                    self._ledger.expired(one)
        batch.find_deadline()

    def _chosen(self, count: int, now: float) -> Sequence[int]:
        """Which of `count` answers the tap is shown: its share, at random, in one step for all of them."""
        self._tap_owed += self._tap_share * count
        shown = min(int(self._tap_owed), count)
        self._tap_owed -= shown
        if not shown and now - self._shown >= self._tap_quiet_s:
            shown = 1
        if not shown:
            return ()
        self._shown = now
        return range(count) if shown == count else self._random.sample(range(count), shown)


def _each(batch: Batch, now: float) -> Iterator[tuple[Part, Arrays | None]]:
    """The parts with their outputs; the requests of a group each for itself where not all of them have an answer."""
    for at, (part, outputs) in enumerate(zip(batch.parts, batch.outputs, strict=True)):
        group = part[0]
        if (
            not isinstance(group, RequestGroup)
            or group.state == ENDED
            or (outputs is not None and (group.deadline is None or now <= group.deadline))
        ):
            yield part, outputs
            continue
        sound = batch.precision == REFERENCE or outputs is not None
        places = group.places()
        arrays = list(cut(batch.unsound[at] if outputs is None else outputs, group.each))
        for place, request in zip(places, group.dissolve(), strict=True):
            mine = arrays[place]
            yield (request, 0, request.rows, request.attempt), mine if sound or finite(mine) else None


def _gathered(request: PendingRequest, count: int, answer: Answer) -> bool:
    """Adds one execution of a split request; True, with `answer` completed, when it was the last."""
    request.unanswered -= count
    request.compute_s = max(request.compute_s, answer.compute_s)
    request.batch_size = max(request.batch_size, answer.batch_size)
    if request.unanswered or request.gather is None:
        return False
    answer.outputs = request.gather.arrays
    answer.compute_s = request.compute_s
    answer.batch_size = request.batch_size
    return True
