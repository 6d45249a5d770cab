"""What may be tuned, which values are worth trying, and which of the tried ones is the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vernier.engine.base import default_buckets
from vernier.package.manifest import Manifest
from vernier.settings import ModelSettings

#: Sustained rates closer than this are taken for equal: two runs of one candidate differ by as much.
NOTICEABLE = 0.05
#: Batch sizes tried at and below the largest that leaves the objective in reach.
_BATCH_STEPS = 3


@dataclass(frozen=True)
class SettingsCandidate:
    """One set of settings, each as in `ModelSettings`; buckets are None for the package's own."""

    slots: int
    max_batch: int
    max_queue_delay_ms: float
    buckets: tuple[int, ...] | None = None
    sequence_buckets: Mapping[str, tuple[int, ...]] | None = None

    def settings(self, objective_ms: float, base: ModelSettings) -> ModelSettings:
        """The model's settings with these and the objective in the place of what `base` says."""
        return ModelSettings.model_validate(
            {**base.model_dump(), **self.as_json(), "latency_objective_ms": objective_ms}
        )

    def as_json(self) -> dict[str, Any]:
        """By the names of the settings; what stays the package's own is None."""
        sequence = self.sequence_buckets
        return {
            "slots": self.slots,
            "max_batch": self.max_batch,
            "max_queue_delay_ms": self.max_queue_delay_ms,
            "buckets": None if self.buckets is None else list(self.buckets),
            "sequence_buckets": None if sequence is None else {d: list(b) for d, b in sequence.items()},
        }


@dataclass(frozen=True)
class Measured:
    """What a candidate did under load.

    Attributes:
        sustained: the highest rate, in requests per second, of which 99 % were answered within the
            objective; 0 when not even a trickle was.
        p50_ms, p99_ms: at the common load, the same for every candidate; None when it cannot carry that.
        padding: share of the computed input elements that was padding, at the common load.
    """

    candidate: SettingsCandidate
    sustained: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    padding: float | None = None


def batch_choices(curve: Mapping[int, float], objective_s: float, slots: int) -> list[int]:
    """Largest batches worth trying, the largest first.

    Args:
        curve: bucket → seconds of one execution.
    """
    share = objective_s / (1.0 + 1.0 / slots)  # see `vernier.serving.queueing.batching.batch_cap`
    fitting = [bucket for bucket, seconds in sorted(curve.items()) if seconds <= share]
    return (fitting or [min(curve)])[: -_BATCH_STEPS - 1 : -1]


def delay_choices(objective_ms: float) -> list[float]:
    """Longest waits for company worth trying, in milliseconds, ascending."""
    return sorted({0.0, round(min(2.0, objective_ms / 4), 3), round(objective_ms / 4, 3)})


def bucket_choices(max_batch: int, own: Sequence[int]) -> list[tuple[int, ...] | None]:
    """Sets of batch sizes to pad to: the package's (None), every other one of them, and the largest alone."""
    sizes = [b for b in own if b < max_batch] or default_buckets(max_batch)[:-1]
    coarse = (*sizes[-2::-2][::-1], max_batch)
    return [None, *[c for c in dict.fromkeys((coarse, (max_batch,))) if c != (*sizes, max_batch)]]


def sequence_choices(manifest: Manifest) -> list[Mapping[str, tuple[int, ...]] | None]:
    """Sets of lengths to pad to: the package's (None), half and twice as many, and one for all."""
    if not manifest.sequence:
        return [None]
    own = {rule.dim: tuple(rule.buckets) for rule in manifest.sequence}
    lows = {dim: manifest.dims[dim].min for dim in own}
    coarse = {dim: sizes[::-2][::-1] for dim, sizes in own.items()}
    fine = {dim: _with_middles(lows[dim], sizes) for dim, sizes in own.items()}
    one = {dim: sizes[-1:] for dim, sizes in own.items()}
    found: list[Mapping[str, tuple[int, ...]] | None] = [None]
    for choice in (coarse, fine, one):
        if choice != own and choice not in found:
            found.append(choice)
    return found


def _with_middles(low: int, sizes: Sequence[int]) -> tuple[int, ...]:
    bounds = [low, *sizes]
    middles = [(a + b) // 2 for a, b in zip(bounds, sizes, strict=False)]
    return tuple(sorted({*sizes, *(m for m in middles if m >= low)}))


def neighbours(
    at: SettingsCandidate,
    batches: Sequence[int],
    delays: Sequence[float],
    buckets: Sequence[tuple[int, ...] | None],
    sequences: Sequence[Mapping[str, tuple[int, ...]] | None],
) -> list[list[SettingsCandidate]]:
    """For each setting in turn, `at` with every other value of that setting."""
    return [
        [replace(at, max_batch=b, buckets=None) for b in batches if b != at.max_batch],
        [replace(at, max_queue_delay_ms=d) for d in delays if d != at.max_queue_delay_ms],
        [replace(at, buckets=b) for b in buckets if b != at.buckets],
        [replace(at, sequence_buckets=s) for s in sequences if s != at.sequence_buckets],
    ]


def pareto(measured: Sequence[Measured]) -> list[Measured]:
    """Those that no other beats in one of sustained rate and p99 without losing in the other."""
    carried = [m for m in measured if m.p99_ms is not None and m.sustained > 0]
    return [m for m in carried if not any(_beats(other, m) for other in carried)]


def _beats(a: Measured, b: Measured) -> bool:
    assert a.p99_ms is not None
    assert b.p99_ms is not None
    no_worse = a.sustained >= b.sustained and a.p99_ms <= b.p99_ms
    return no_worse and (a.sustained > b.sustained or a.p99_ms < b.p99_ms)


def best(measured: Sequence[Measured]) -> Measured | None:
    """The highest sustained rate; of those that are about equal, the first with the lowest p99.

    None when no candidate sustains any load.
    """
    top = max((m.sustained for m in measured), default=0.0)
    if not top:
        return None
    equal = [m for m in measured if m.sustained >= top * (1 - NOTICEABLE)]
    return min(equal, key=lambda m: float("inf") if m.p99_ms is None else m.p99_ms)
