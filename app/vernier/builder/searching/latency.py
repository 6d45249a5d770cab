"""How long each variant takes per batch size on the runtime at hand, and which variant is the fastest.

Variants are timed in turns, so that a machine that slows down for a second slows all of them down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import numpy as np

from vernier.builder.progress import Progress
from vernier.engine.base import Executor, Slot
from vernier.engine.curve import repeat_rows
from vernier.package.manifest import Batching
from vernier.tensors import Arrays

_WARM_UP_RUNS = 2
_LEAST_RUNS, _MOST_RUNS = 5, 200
_SECONDS_PER_BUCKET = 0.15
#: A variant must be faster than a safer one by this share to be preferred to it: equal ones differ by as much.
NOTICEABLE = 0.05

Curve = dict[int, float]


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of one run by precision and bucket.

    median: what a caller may expect; variants are compared by it, and tables and sentences show it.
    undisturbed, disturbed: the lower and the upper quartile, between which half of the runs lie.
    """

    median: dict[str, Curve]
    undisturbed: dict[str, Curve]
    disturbed: dict[str, Curve] = field(default_factory=dict)

    def spread(self, precision: str) -> dict[int, tuple[float, float]]:
        """Bucket → the lower and the upper quartile."""
        low, high = self.undisturbed.get(precision, {}), self.disturbed.get(precision, {})
        return {bucket: (low[bucket], high[bucket]) for bucket in low if bucket in high}


def batches_of(samples: Arrays, batching: Batching) -> list[tuple[int, Arrays]]:
    """One batch per bucket, from real samples: zeros may be faster than numbers."""
    if batching.kind == "none":
        return [(1, {name: np.asarray(array[0]) for name, array in samples.items()})]
    return [(size, repeat_rows(samples, size)) for size in batching.buckets]


def measure(
    executors: Mapping[str, Executor],
    batches: Sequence[tuple[int, Arrays]],
    progress: Progress,
    *,
    limit_s: float = 12.0,
    clock: Callable[[], float] = perf_counter,
) -> Latencies:
    """Times one run of each variant per bucket, staging by the caller not included.

    Args:
        batches: (bucket, inputs), ascending; all variants take the same inputs.
        limit_s: large buckets are left out when they would not fit into this time; the first is measured
            whatever it takes.
    """
    found = Latencies(
        {name: {} for name in executors}, {n: {} for n in executors}, {n: {} for n in executors}
    )
    end = clock() + limit_s
    previous = 0.0
    with ExitStack() as stack, progress.task("measuring latency", len(batches)) as advance:
        slots = {name: stack.enter_context(_slot(executor)) for name, executor in executors.items()}
        for position, (bucket, inputs) in enumerate(batches):
            growth = 1.0 if position == 0 else bucket / batches[position - 1][0]
            if clock() + previous * growth * (_WARM_UP_RUNS + _LEAST_RUNS) > end:
                break
            times = _time_in_turns(slots, inputs, _SECONDS_PER_BUCKET, clock)
            for name, seconds in times.items():
                found.median[name][bucket] = median(seconds) * 1000
                found.undisturbed[name][bucket] = sorted(seconds)[len(seconds) // 4] * 1000
                found.disturbed[name][bucket] = sorted(seconds)[-1 - len(seconds) // 4] * 1000
            previous = sum(median(seconds) for seconds in times.values())
            advance(1)
    return found


@contextmanager
def _slot(executor: Executor) -> Iterator[Slot]:
    slot = executor.open_slot()
    try:
        yield slot
    finally:
        slot.close()


def _time_in_turns(
    slots: Mapping[str, Slot], inputs: Arrays, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in slots}
    for slot in slots.values():
        views = slot.stage({name: array.shape for name, array in inputs.items()})
        for name, array in inputs.items():
            views[name][...] = array
        for _ in range(_WARM_UP_RUNS):
            slot.run()
    end = clock() + seconds * len(slots)
    for turn in range(_MOST_RUNS):
        if turn >= _LEAST_RUNS and clock() >= end:
            break
        for name, slot in slots.items():
            began = clock()
            slot.run()
            times[name].append(clock() - began)
    return times


def relative_time(latency_ms: Mapping[int, float], reference_ms: Mapping[int, float]) -> float:
    """How long one takes relative to the other: the geometric mean over the buckets that both have."""
    common = [bucket for bucket in reference_ms if bucket in latency_ms]
    if not common:
        return math.inf
    return math.exp(sum(math.log(latency_ms[b] / reference_ms[b]) for b in common) / len(common))


def fastest(latencies: Latencies, safest_first: Sequence[str]) -> str:
    """The fastest variant; between two that take about the same time, the safer.

    Args:
        safest_first: the variants to choose from, the reference (FP32) first.
    """
    best = safest_first[0]
    for name in safest_first[1:]:
        if _is_faster(latencies.median[name], latencies.median[best]):
            best = name
    return best


def _is_faster(curve: Curve, than: Curve) -> bool:
    """On the whole, and at most batch sizes: one bucket that was disturbed decides nothing."""
    ratios = [curve[bucket] / than[bucket] for bucket in than if bucket in curve]
    return relative_time(curve, than) < 1 - NOTICEABLE and bool(ratios) and median(ratios) < 1 - NOTICEABLE
