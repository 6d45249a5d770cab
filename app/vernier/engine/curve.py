"""How long a variant takes on this device, by bucket: what the scheduler plans with, and `auto` decides by."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Callable, Dict, List, Sequence

import numpy as np

from vernier.engine.base import Slot
from vernier.tensors import Arrays

#: Runs before timing: plain, plain with events, capture; the graph's own first launch.
WARM_UP_RUNS = 4


def repeat_rows(samples: Arrays, rows: int) -> Arrays:
    """The samples again and again until there are `rows` of them."""
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in samples.items()}


def measure_curve(
    slot: Slot,
    samples: Arrays,
    buckets: Sequence[int],
    *,
    seconds_per_bucket: float = 0.1,
    least_runs: int = 10,
    batched: bool = True,
    clock: Callable[[], float] = perf_counter,
) -> Dict[int, float]:
    """Bucket → median seconds of one `run`, copies included, staging by the caller not.

    Args:
        samples: real inputs such as the golden vectors: an engine may be faster on zeros.
        batched: False when the model has no batch axis; `samples` then are one request.
    """
    curve: Dict[int, float] = {}
    for bucket in buckets:
        inputs = repeat_rows(samples, bucket) if batched else samples
        views = slot.stage({name: array.shape for name, array in inputs.items()})
        for name, array in inputs.items():
            views[name][...] = array
        for _ in range(WARM_UP_RUNS):
            slot.run()
        times: List[float] = []
        end = clock() + seconds_per_bucket
        while len(times) < least_runs or clock() < end:
            started = clock()
            slot.run()
            times.append(clock() - started)
        curve[bucket] = median(times)
    return curve
