"""What Vernier wants to reach, as ratios of one run, and what it reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """`figure` of Vernier divided by that of `peer`, at least (for p99_ms: at most) `limit`."""

    part: str
    peer: str
    figure: str
    limit: float
    text: str


GOALS = (
    Goal("json", "mosec", "rate", 2.5, "small JSON, requests/s: Vernier ÷ MOSEC"),
    Goal("json", "fastapi", "rate", 10, "small JSON, requests/s: Vernier ÷ FastAPI + ONNX Runtime"),
    Goal("json", "pytriton", "rate", 15, "small JSON, requests/s: Vernier ÷ Triton's Python backend"),
    Goal("json", "mosec", "p99_ms", 0.5, "small JSON, p99: Vernier ÷ MOSEC"),
    Goal("binary", "mosec", "rate", 1.8, "small binary, requests/s: Vernier ÷ MOSEC"),
    Goal("large", "mosec", "rate", 2.5, "600 KB binary, requests/s: Vernier ÷ MOSEC"),
    Goal(
        "large",
        "mosec",
        "core_rate",
        2.5,
        "600 KB binary, requests per second of the server core's time: Vernier ÷ MOSEC",
    ),
    Goal(
        "large",
        "uvicorn-drain",
        "rate",
        0.7,
        "600 KB binary, requests/s: Vernier ÷ bare uvicorn that only reads",
    ),
    Goal(
        "decode",
        "orjson and NumPy",
        "rate",
        2.5,
        "JSON decoding of 3×224×224: orjson and NumPy ÷ Vernier, in time",
    ),
)


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest over the rounds."""

    median: float
    low: float
    high: float


def ratio(part: Mapping[str, Any], peer: str, figure: str) -> Ratio | None:
    """Vernier's figure divided by the peer's, round by round. None when one of them was not measured."""
    if "times_ms" in part:
        ours, theirs = part["times_ms"]["vernier"], part["times_ms"][peer]
        found = [b / a for a, b in zip(ours, theirs, strict=True)]
    else:
        rounds = part["rounds"]
        if not rounds.get("vernier") or not rounds.get(peer):
            return None
        pairs = zip(rounds["vernier"], rounds[peer], strict=False)
        found = [a[figure] / b[figure] for a, b in pairs if a.get(figure) is not None and b.get(figure)]
    return Ratio(statistics.median(found), min(found), max(found)) if found else None


def is_met(goal: Goal, reached: Ratio) -> bool:
    return reached.median <= goal.limit if goal.figure == "p99_ms" else reached.median >= goal.limit
