"""An engine that has proven itself, what happened on the way there, and which of several should serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Optional

from vernier.engine.base import Executor
from vernier.package.manifest import PRECISIONS


@dataclass(frozen=True)
class ValidatedEngine:
    """An executor that has proven itself here, and bucket → median seconds as measured here."""

    executor: Executor
    curve: Mapping[int, float]


@dataclass(frozen=True)
class PlanEvent:
    """What happened, for log and metrics.

    kind: `mismatch` (a plan does not fit), `rebuilding`, `rebuilt`, `ready`, or `refused` (the variant
    will not be served: `reason` says why; `self_test` tells whether it failed on this GPU).
    """

    kind: str
    precision: str
    reason: str = ""
    self_test: bool = False


def choose(ready: Mapping[str, ValidatedEngine], wanted: str) -> Optional[str]:
    """The precision that should serve, of those that are ready; None while none is.

    A named precision: itself, else the nearest safer one, else the safest. `auto`: the fastest at the
    largest bucket that all were measured at; the safer of two equals.
    """
    if not ready:
        return None
    order = [p for p in PRECISIONS if p in ready]
    if wanted != "auto":
        safer = [p for p in order if PRECISIONS.index(p) <= PRECISIONS.index(wanted)]
        return safer[-1] if safer else order[0]
    shared = set.intersection(*(set(engine.curve) for engine in ready.values()))
    return min(order, key=lambda p: ready[p].curve[max(shared)]) if shared else order[0]
