"""First executions of a new slot: they allocate, they are slow, and they tell what the next ones will take.

Nothing takes traffic before it has executed here; but a large batch of a slow model would keep the whole service
from being ready for seconds. What does not fit into the time is taken from the curve that was measured before (by the
build, or on this GPU), scaled by what was measured now; traffic corrects it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

from vernier.engine.base import Slot
from vernier.engine.pool import OpenSlots
from vernier.errors import EngineError
from vernier.serving.queueing.latency import LatencyCurve
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.scheduling.worker_pool import Curves

logger = logging.getLogger(__name__)

#: For one variant, in seconds. The smallest bucket always runs; others while they should fit.
_TIME_TO_MEASURE_S = 0.25
#: Runs of one bucket: some always, more while they are quick, since others may use the machine just now.
_MIN_RUNS, _MAX_RUNS, _QUICK_S = 2, 30, 0.005
#: What the first run of a bucket may cost beyond the next ones, in runs: it allocates.
_FIRST_RUN = 1


def warm_up(
    slots: OpenSlots,
    layout: BatchLayout,
    expected: Mapping[str, Mapping[int, float]] | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Curves:
    """Runs every variant at the smallest bucket, at the largest and at others while they fit into the time.

    Args:
        expected: precision → bucket → seconds as measured before, perhaps on another machine.

    Returns:
        Precision → bucket → seconds of the quickest run, staging included; where `expected` tells the
        curve's shape, buckets that did not run are filled in.
    """
    curves: Curves = {}
    for precision, slot in slots.items():
        shape = LatencyCurve(layout.buckets, True, (expected or {}).get(precision))
        try:
            curves[precision] = _measure(slot, layout, shape, clock)
        except EngineError as error:
            # The self-test with real inputs has passed; zeros may be no valid input of this model.
            logger.warning("warm-up failed", extra={"precision": precision, "error": error.message})
            curves[precision] = {}
    return curves


def _measure(
    slot: Slot, layout: BatchLayout, shape: LatencyCurve, clock: Callable[[], float]
) -> dict[int, float]:
    measured: dict[int, float] = {}
    ends = clock() + _TIME_TO_MEASURE_S
    for bucket in dict.fromkeys((layout.buckets[0], layout.largest, *layout.buckets)):
        cost = (_MIN_RUNS + _FIRST_RUN) * _guess(measured, shape, bucket) if measured else 0.0
        if clock() + cost <= ends or not measured:
            measured[bucket] = _quickest(slot, layout, bucket, ends, clock)
    return _completed(measured, layout.buckets, shape)


def _guess(measured: Mapping[int, float], shape: LatencyCurve, bucket: int) -> float:
    """Seconds that a bucket should take, from the nearest smaller one that ran."""
    near = max(known for known in measured if known <= bucket)
    grows = shape.seconds(bucket) / shape.seconds(near) if shape.known else bucket / near
    return measured[near] * grows


def _completed(
    measured: Mapping[int, float], buckets: Sequence[int], shape: LatencyCurve
) -> dict[int, float]:
    if not shape.known:
        return dict(measured)
    return {b: measured[b] if b in measured else _guess(measured, shape, b) for b in buckets}


def _quickest(slot: Slot, layout: BatchLayout, rows: int, ends: float, clock: Callable[[], float]) -> float:
    quick = clock() + _QUICK_S
    best = float("inf")
    for run in range(_MAX_RUNS):
        best = min(best, _time(slot, layout, rows, clock))
        now = clock()
        if now > ends or (run + 1 >= _MIN_RUNS and now > quick):
            break
    return best


def _time(slot: Slot, layout: BatchLayout, rows: int, clock: Callable[[], float]) -> float:
    inputs = layout.example(layout.typical, rows)
    began = clock()
    views = slot.stage({name: array.shape for name, array in inputs.items()})
    for name, array in inputs.items():
        views[name][...] = array
    slot.run()
    return clock() - began


def probe(slot: Slot, layout: BatchLayout) -> None:
    """The smallest execution there is. Raises EngineError when even that fails."""
    _time(slot, layout, layout.buckets[0], perf_counter)
