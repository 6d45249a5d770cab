"""One execution on one slot: stage, run, take apart. Runs on whichever thread owns the slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

from vernier.engine.base import Slot, StageTimes
from vernier.errors import EngineError, VernierError
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.queueing.span import ExecutionPart, ShapeKey
from vernier.tensors import Array, Arrays, is_finite

#: The variant that is never retried: what it answers is the model's answer, finite or not.
REFERENCE = "fp32"


class Execution:
    """What is computed together, and afterwards what came of it. From when it is made it reads its batches' inputs.

    Attributes:
        parts: whose rows, in order.
        device_index: number of the device that it runs on, of those that the executors span.
        precision, shape: of the batch queue that its requests waited in.
        rows, bucket: useful rows, and rows after padding.
        reason: why it was dispatched.
        deadline: when the first of its requests will be given up.
        predicted_s: by the latency curve, when it was dispatched.
        dispatched: when, on the scheduler's clock.
        outputs: each part's own outputs, once it ran.
        nonfinite: by the number of a part, its requests whose outputs are not finite and must not be answered.
        error: why there are no outputs.
        times: by stage. compute_s: all of it, staging and taking apart included.
        elements: input elements sent, and computed after padding.
    """

    __slots__ = (
        "bucket",
        "compute_s",
        "deadline",
        "device_index",
        "dispatched",
        "elements",
        "error",
        "layout",
        "nonfinite",
        "outputs",
        "parts",
        "precision",
        "predicted_s",
        "reason",
        "rows",
        "shape",
        "times",
    )

    def __init__(
        self,
        layout: BatchLayout,
        precision: str,
        shape: ShapeKey,
        parts: Sequence[ExecutionPart],
        rows: int,
        bucket: int,
        reason: str,
        predicted_s: float,
        dispatched: float,
    ) -> None:
        self.layout = layout
        self.precision = precision
        self.shape = shape
        self.parts = parts
        self.device_index = 0
        self.rows = rows
        self.bucket = bucket
        self.reason = reason
        self.predicted_s = predicted_s
        self.dispatched = dispatched
        self.outputs: Sequence[Arrays] = ()
        self.nonfinite: dict[int, list[int]] = {}
        self.error: VernierError | None = None
        self.times = StageTimes()
        self.compute_s = 0.0
        self.elements = (0, 0)
        for part in parts:
            part.batch.state.readers += 1
        self.deadline: float | None = None
        self.find_deadline()

    @property
    def ends(self) -> float:
        """When it should have run, on the scheduler's clock."""
        return self.dispatched + self.predicted_s

    @property
    def requests(self) -> int:
        """How many requests it has rows of, ended ones among them."""
        return sum([part.span.stop - part.span.start for part in self.parts])

    def find_deadline(self) -> None:
        """The earliest deadline of requests that have not ended; see `deadline`."""
        earliest: float | None = None
        for batch, span, _, _ in self.parts:
            deadlines = batch.deadlines
            if deadlines is not None:
                for run in batch.state.living(span.start, span.stop):
                    first = min(deadlines[run.start : run.stop])
                    earliest = first if earliest is None else min(first, earliest)
        self.deadline = earliest

    def execute(self, slot: Slot, clock: Callable[[], float] = perf_counter) -> None:
        """Runs it. Never raises for what an engine or a request does: see `error`."""
        began = clock()
        try:
            self._execute(slot)
        except VernierError as error:
            self.error = error
        except Exception as error:
            self.error = EngineError(f"the batch could not be run: {error!r}")
            self.error.__cause__ = error
        self.compute_s = clock() - began

    def _execute(self, slot: Slot) -> None:
        layout, parts = self.layout, self.parts
        inputs = layout.in_place(self.shape, parts, self.bucket) if slot.reads_in_place else None
        if inputs is not None:
            slot.read_in_place(inputs)
        else:
            views = slot.stage(layout.shapes(self.shape, self.bucket))
            layout.fill(views, parts, self.rows, self.bucket)
        results = slot.run()
        self.times = slot.last_times
        self.elements = layout.elements(parts, self.rows, self.bucket, self.shape)
        outputs = layout.take_apart(results, parts, slot.fresh_outputs)
        if self.precision != REFERENCE and not finite(results, self.rows if layout.kind != "none" else None):
            self._find_nonfinite(outputs)
        for at, (_, span, start, _) in enumerate(parts):
            gather = span.gather
            if gather is not None and not gather.abandoned and at not in self.nonfinite:
                gather.put(start - span.first, outputs[at])
        self.outputs = outputs

    def _find_nonfinite(self, outputs: Sequence[Arrays]) -> None:
        for at, ((batch, span, first, _), own) in enumerate(zip(self.parts, outputs, strict=True)):
            if finite(own):
                continue
            if len(span) == 1:
                self.nonfinite[at] = [span.start]
                continue
            starts = batch.state.starts
            self.nonfinite[at] = [
                request
                for request in range(span.start, span.stop)
                if not finite(rows_of(own, starts[request] - first, starts[request + 1] - first))
            ]


def rows_of(arrays: Arrays, start: int, stop: int) -> Arrays:
    """The rows [start, stop) of each array."""
    return {name: array[start:stop] for name, array in arrays.items()}


def finite(outputs: Mapping[str, Array], rows: int | None = None) -> bool:
    """Whether no floating-point output holds NaN or an infinity in its first `rows` rows (None: in all)."""
    return all(
        is_finite(array if rows is None else array[:rows])
        for array in outputs.values()
        if array.dtype.kind == "f"
    )
