"""One batch on one slot: stage, run, take apart. Runs on whichever thread owns the slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from vernier.engine.base import Slot, StageTimes
from vernier.errors import EngineError, VernierError
from vernier.serving.padding import BatchLayout, Part
from vernier.serving.request import ENDED, RequestGroup
from vernier.serving.request_queue import Lane
from vernier.tensors import Array, Arrays, is_finite

#: The variant that is never rescued: what it answers is the model's answer, finite or not.
REFERENCE = "fp32"


class Batch:
    """What one execution computes, and afterwards what came of it.

    Attributes:
        parts: whose rows, in order.
        place: number of the device that it runs on, of those that the executors span.
        precision, shape: of the lane that they waited in.
        rows, bucket: useful rows, and rows after padding.
        reason: why it was dispatched.
        deadline: when the first of its requests will be given up.
        predicted_s: by the latency curve, when it was dispatched.
        dispatched: when, on the scheduler's clock.
        outputs: each part's own outputs, once it ran; None for a part that needs rescue.
        unsound: by its place, the outputs of a group of which some are not finite.
        error: why there are no outputs.
        times: by stage. compute_s: all of it, staging and taking apart included.
        elements: input elements sent, and computed after padding.
    """

    __slots__ = (
        "bucket",
        "compute_s",
        "deadline",
        "dispatched",
        "elements",
        "error",
        "layout",
        "outputs",
        "parts",
        "place",
        "precision",
        "predicted_s",
        "reason",
        "rows",
        "shape",
        "times",
        "unsound",
    )

    def __init__(
        self,
        layout: BatchLayout,
        lane: Lane,
        parts: list[Part],
        rows: int,
        bucket: int,
        reason: str,
        predicted_s: float,
        dispatched: float,
    ) -> None:
        self.layout = layout
        self.precision = lane.precision
        self.shape = lane.shape
        self.parts = parts
        self.place = 0
        self.rows = rows
        self.bucket = bucket
        self.reason = reason
        self.predicted_s = predicted_s
        self.dispatched = dispatched
        self.outputs: list[Arrays | None] = []
        self.unsound: dict[int, Arrays] = {}
        self.error: VernierError | None = None
        self.times = StageTimes()
        self.compute_s = 0.0
        self.elements = (0, 0)
        self.deadline: float | None = None
        self.find_deadline()

    @property
    def ends(self) -> float:
        """When it should have run, on the scheduler's clock."""
        return self.dispatched + self.predicted_s

    def find_deadline(self) -> None:
        """The earliest deadline of what is still wanted; see `deadline`."""
        earliest: float | None = None
        for request, _, _, _ in self.parts:
            due = request.deadline
            if due is not None and request.state != ENDED and (earliest is None or due < earliest):
                earliest = due
        self.deadline = earliest

    def each(self) -> list[Part]:
        """Its parts, with the requests of a group each for itself from now on. Not while it runs."""
        parts: list[Part] = []
        for part in self.parts:
            group = part[0]
            if isinstance(group, RequestGroup) and group.state != ENDED:
                parts += [(one, 0, one.rows, one.attempt) for one in group.dissolve()]
            else:
                parts.append(part)
        return parts

    def execute(self, slot: Slot, clock: Callable[[], float] = perf_counter) -> None:
        """Runs the batch. Never raises for what an engine or a request does: see `error`."""
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
        taken: list[Arrays | None] = [*layout.take_apart(results, parts, slot.fresh_outputs)]
        if self.precision != REFERENCE and not finite(results, self.rows if layout.kind != "none" else None):
            for at, mine in enumerate(taken):
                if mine is not None and not finite(mine):
                    taken[at] = None
                    if isinstance(parts[at][0], RequestGroup):
                        self.unsound[at] = mine
        for (request, start, _, attempt), mine in zip(parts, taken, strict=True):
            gather = request.gather
            if (
                gather is not None
                and mine is not None
                and request.state != ENDED
                and request.attempt == attempt
            ):
                gather.put(start, mine)
        self.outputs = taken


def finite(outputs: Mapping[str, Array], rows: int | None = None) -> bool:
    """Whether no floating-point output holds NaN or an infinity in its first `rows` rows (None: in all)."""
    return all(
        is_finite(array if rows is None else array[:rows])
        for array in outputs.values()
        if array.dtype.kind == "f"
    )
