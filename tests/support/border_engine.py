"""A scheduler without threads whose executions begin and end when a test says so: y = factor · x, z = x + mark.

The numbers in x tell which request a row belongs to; they are read when an execution begins and when it ends, and must
not have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vernier.border.batch import Answer, RequestBatch
from vernier.border.catalogue import SchedulerObserver
from vernier.errors import (
    DeadlineExceeded,
    Draining,
    EngineError,
    QueueFull,
    UnsupportedPrecision,
    VernierError,
)

#: No request has more rows.
ROWS = 8


def mark(precision: str) -> float:
    return float(sum(map(ord, precision)))


def factor(name: str, version: int) -> float:
    return 2.0 + len(name) + 16 * version


@dataclass(eq=False)
class Execution:
    batch: RequestBatch
    requests: Sequence[int]
    precision: str
    seen: np.ndarray


class ManualScheduler:
    """Belongs to the event loop's thread.

    Attributes:
        batches: that were submitted and are not released, with their requests that have not ended.
        begun: those of which something runs or has run.
    """

    def __init__(
        self,
        factor: float,
        clock: Callable[[], float],
        precisions: Sequence[str] = ("fp32",),
        queue_limit: int = 10**9,
    ) -> None:
        self.factor = factor
        self.precisions = precisions
        self.queue_limit = queue_limit
        self.clock = clock
        self.draining = False
        self.batches: dict[RequestBatch, set[int]] = {}
        self.waiting: list[tuple[RequestBatch, int]] = []
        self.running: list[Execution] = []
        self.begun: set[RequestBatch] = set()
        self.observer: SchedulerObserver | None = None
        self.on_submit: Callable[[RequestBatch], None] = lambda batch: None

    def watch(self, observer: SchedulerObserver) -> None:
        self.observer = observer
        self._show()

    def _show(self) -> None:
        if self.observer is not None:
            self.observer.room(self.queue_limit - len(self.waiting), 0.5)

    # --- in ---------------------------------------------------------------------------------------
    def submit(self, batch: RequestBatch) -> None:
        self.on_submit(batch)
        batch.state = self
        living = self.batches[batch] = set(range(len(batch)))
        room = self.queue_limit - len(self.waiting)
        for at in range(len(batch)):
            error: VernierError | None = None
            if self.draining:
                error = Draining("the model leaves")
            elif batch.deadlines is not None and batch.deadlines[at] <= self.clock():
                error = DeadlineExceeded("too late")
            elif batch.precision is not None and batch.precision not in self.precisions:
                error = UnsupportedPrecision("not loaded")
            elif room <= 0:
                error = QueueFull("full", 0.5)
            if error is None:
                room -= 1
                self.waiting.append((batch, at))
            else:
                living.discard(at)
                batch.target.failed(batch, (at,), error)
        self._show()
        self._release(batch)

    def cancel(self, batch: RequestBatch, index: int) -> None:
        if batch in self.batches:
            self.batches[batch].discard(index)
            self._leave(batch, (index,))
            self._release(batch)

    def expire(self) -> None:
        for batch, living in list(self.batches.items()):
            late = [at for at in sorted(living) if batch.deadlines and batch.deadlines[at] <= self.clock()]
            if late:
                living.difference_update(late)
                self._leave(batch, late)
                batch.target.failed(batch, late, DeadlineExceeded("the deadline has come"))
                self._release(batch)

    def _leave(self, batch: RequestBatch, requests: Sequence[int]) -> None:
        """They do not wait any more."""
        self.waiting = [(other, at) for other, at in self.waiting if other is not batch or at not in requests]
        self._show()

    # --- executions -------------------------------------------------------------------------------
    def begin(self, most: int = 10**9) -> Execution | None:
        """Runs consecutive requests of the batch that has waited longest."""
        if not self.waiting:
            return None
        batch, first = self.waiting[0]
        requests = [first]
        while len(requests) < most and (batch, requests[-1] + 1) in self.waiting:
            requests.append(requests[-1] + 1)
        self._leave(batch, requests)
        if self.observer is not None:
            self.observer.started(batch)
        self.begun.add(batch)
        precision = batch.precision or self.precisions[0]
        execution = Execution(batch, requests, precision, batch.inputs["x"].copy())
        self.running.append(execution)
        return execution

    def finish(self, execution: Execution, error: EngineError | None = None) -> None:
        self.running.remove(execution)
        batch, living = execution.batch, self.batches[execution.batch]
        inputs = batch.inputs["x"]
        np.testing.assert_array_equal(inputs, execution.seen, "memory changed while it was read")
        starts = np.concatenate([[0], np.cumsum(batch.rows)])
        run: list[int] = []
        for at in [*execution.requests, -1]:
            if run and at not in living:
                rows = inputs[starts[run[0]] : starts[run[-1] + 1]]
                outputs = {
                    "y": np.float32(self.factor) * rows,
                    "z": rows + np.float32(mark(execution.precision)),
                }
                wanted = {name: outputs[name] for name in batch.outputs}
                answer = Answer(wanted, execution.precision, 0.001, 0.002, len(rows))
                living.difference_update(run)
                if error is None:
                    batch.target.answered(batch, range(run[0], run[-1] + 1), answer)
                else:
                    batch.target.failed(batch, run, error)
                run = []
            if at in living:
                run.append(at)
        self._release(batch)

    def _release(self, batch: RequestBatch) -> None:
        reading = any(execution.batch is batch for execution in self.running)
        if batch in self.batches and not self.batches[batch] and not reading:
            del self.batches[batch]
            self.begun.discard(batch)
            batch.target.released(batch)


def numbers_of(batch: RequestBatch) -> set[int]:
    """The numbers of the requests whose rows a batch holds."""
    return {int(value) // ROWS for value in batch.inputs["x"][:, 0]}
