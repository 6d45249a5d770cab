"""What the service wants to reach on several cores, and what it must not lose on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.peers.goals import Ratio
from benchmarks.scaling.results import Run, Spot, ratio, total

#: The number of cores that the goals are set for.
MANY = 8
OURS = "vernier"


@dataclass(frozen=True)
class Goal:
    """`figure` at `ours` divided by that at `theirs`, at least or at most `limit`."""

    text: str
    ours: Spot
    theirs: Spot
    figure: str
    sign: Literal["≥", "≤"]
    limit: float

    def is_met(self, reached: Ratio) -> bool:
        return reached.median >= self.limit if self.sign == "≥" else reached.median <= self.limit


@dataclass(frozen=True)
class Verdict:
    """`reached` is None, and `is_met` too, when one of both was not measured."""

    goal: Goal
    reached: Ratio | None

    @property
    def is_met(self) -> bool | None:
        return None if self.reached is None else self.goal.is_met(self.reached)


def _against(
    server: str, case: str, what: str, figure: str, sign: Literal["≥", "≤"], limit: float, size: int = MANY
) -> Goal:
    on = "one core" if size == 1 else f"{size} cores"
    titles = {
        "vernier-before": "before",
        "mosec": "MOSEC at its best",
        "fastapi": f"FastAPI with {size} workers",
    }
    words = {"rate": "requests/s", "p50_ms": "p50", "p99_ms": "p99"}
    return Goal(
        f"{on}, {what}, {words[figure]}: Vernier ÷ {titles[server]}",
        Spot(size, case, OURS),
        Spot(size, case, server),
        figure,
        sign,
        limit,
    )


def _small_json(connections: int) -> list[Goal]:
    case, what = f"json-{connections}", f"small JSON at {connections} connections"
    return [
        _against("vernier-before", case, what, "rate", "≥", 3),
        _against("mosec", case, what, "rate", "≥", 2),
        _against("fastapi", case, what, "rate", "≥", 4),
        _against("mosec", case, what, "p99_ms", "≤", 1),
    ]


GOALS = (
    *_small_json(96),
    *_small_json(384),
    Goal(
        f"{MANY} cores, 96 connections, requests/s: Vernier's small binary ÷ its small JSON",
        Spot(MANY, "binary-96", OURS),
        Spot(MANY, "json-96", OURS),
        "rate",
        "≥",
        1.2,
    ),
    _against("vernier-before", "large-64", "600 KB", "rate", "≥", 3),
    _against("vernier-before", "json-1", "one connection alone", "p50_ms", "≤", 1.3),
    _against("vernier-before", "json-96", "small JSON at 96 connections", "rate", "≥", 0.85, size=1),
    _against("vernier-before", "large-64", "600 KB", "rate", "≥", 0.9, size=1),
)


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    return [Verdict(goal, ratio(runs, goal.ours, goal.theirs, goal.figure)) for goal in GOALS]


def failures(runs: Sequence[Run]) -> int:
    """Requests that Vernier refused or left without an answer, in all that was measured."""
    return total(runs, OURS, "refused") + total(runs, OURS, "errors")
