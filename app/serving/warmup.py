"""First executions of a new slot: they allocate, they are slow, and they tell what the next ones will take."""

from __future__ import annotations

import logging
from time import perf_counter

from app.engine.base import Slot
from app.engine.pool import Slots
from app.errors import EngineError
from app.serving.padding import BatchLayout
from app.serving.workers import Curves

logger = logging.getLogger(__name__)

#: For measuring one variant, in seconds; buckets left over are guessed from the others.
_TIME_TO_MEASURE_S = 0.25
#: Runs of one bucket: some always, more while they are quick, since others may use the machine just now.
_LEAST_RUNS, _MOST_RUNS, _QUICK_S = 3, 30, 0.005


def warm_up(slots: Slots, layout: BatchLayout) -> Curves:
    """Runs every variant at the smallest and the largest bucket, and at others while there is time.

    Returns:
        Precision → bucket → seconds of the quickest run, staging included.
    """
    curves: Curves = {}
    for precision, slot in slots.items():
        curve: dict[int, float] = {}
        ends = perf_counter() + _TIME_TO_MEASURE_S
        try:
            for bucket in dict.fromkeys((layout.buckets[0], layout.largest, *layout.buckets)):
                if len(curve) >= 2 and perf_counter() > ends:
                    break
                curve[bucket] = _quickest(slot, layout, bucket)
        except EngineError as error:
            # The self-test with real inputs has passed; zeros may be no valid input of this model.
            logger.warning("warm-up failed", extra={"precision": precision, "error": error.message})
        curves[precision] = curve
    return curves


def _quickest(slot: Slot, layout: BatchLayout, rows: int) -> float:
    ends = perf_counter() + _QUICK_S
    best = float("inf")
    for run in range(_MOST_RUNS):
        best = min(best, _time(slot, layout, rows))
        if run + 1 >= _LEAST_RUNS and perf_counter() > ends:
            break
    return best


def _time(slot: Slot, layout: BatchLayout, rows: int) -> float:
    inputs = layout.example(layout.typical, rows)
    began = perf_counter()
    views = slot.stage({name: array.shape for name, array in inputs.items()})
    for name, array in inputs.items():
        views[name][...] = array
    slot.run()
    return perf_counter() - began


def probe(slot: Slot, layout: BatchLayout) -> None:
    """The smallest execution there is. Raises EngineError when even that fails."""
    _time(slot, layout, layout.buckets[0])
