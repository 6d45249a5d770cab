"""The highest rate that client and service hold together when requests come by themselves.

A closed loop waits for answers before it asks again, so it never falls behind and shows a rate at which an open one
queues without end. Capacity here is what arrivals at random are answered at within an objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.load import OpenLoop, Summary, measure

_HALVINGS = 5


def highest_held(ceiling: float, holds: Callable[[float], bool], halvings: int = _HALVINGS) -> float:
    """The highest rate that `holds`, to within `ceiling` / 2^`halvings`; 0 when none of those tried does.

    Args:
        ceiling: tried first, and never passed.
        holds: must be true up to some rate and false above it.
    """
    if holds(ceiling):
        return ceiling
    held, missed = 0.0, ceiling
    for _ in range(halvings):
        middle = (held + missed) / 2
        if holds(middle):
            held = middle
        else:
            missed = middle
    return held


def is_held(summary: Summary, objective_ms: float) -> bool:
    """Whether every request was answered with 200, and 99 % of them within the objective."""
    answered = summary.requests > 0 and summary.statuses == {200: summary.requests}
    return answered and summary.p99_ms is not None and summary.p99_ms <= objective_ms


def open_capacity(plan: OpenLoop, objective_ms: float, core: int | None) -> float:
    """Requests per second; `plan.rate` is the ceiling, and each rate is tried for `plan.seconds`.

    Raises SystemExit when not even a small part of the ceiling is held.
    """

    def holds(rate: float) -> bool:
        summary = measure(replace(plan, rate=rate), core).summary()
        held = is_held(summary, objective_ms)
        p99 = "no answer" if summary.p99_ms is None else f"p99 {summary.p99_ms:.1f} ms"
        print(f"{rate:.0f} requests/s: {p99}, {'held' if held else 'not held'}", flush=True)
        return held

    found = highest_held(plan.rate, holds)
    if not found:
        raise SystemExit(
            f"no rate is answered within {objective_ms:g} ms here: stop what else runs, or raise --objective-ms"
        )
    return found
