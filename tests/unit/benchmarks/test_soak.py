"""The soak's rule: it sees a leak, and takes noise for noise."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.load import Summary
from benchmarks.soak.capacity import highest_held, is_held
from benchmarks.soak.page import page, picture
from benchmarks.soak.verdict import judge

Rows = list[dict[str, float]]


def rows(**changes: object) -> Rows:
    """Twenty quiet blocks; a change is one value for each of them, or one for all."""
    rng = np.random.default_rng(1)
    quiet: dict[str, object] = {
        "requests": 1000,
        "p50_ms": 2 + 0.05 * rng.normal(size=20),
        "p99_ms": 9 + 0.5 * rng.normal(size=20),
        "p999_ms": 20,
        "rss_mb": 200 + rng.normal(size=20),
        "descriptors": 60,
        "threads": 12,
        "reloads": 4,
        "late_s": 0.01,
        "stolen_s": 0.2,
    }
    columns = {name: np.broadcast_to(np.asarray(v, float), 20) for name, v in (quiet | changes).items()}
    return [{name: float(column[at]) for name, column in columns.items()} for at in range(20)]


def missed(found: Rows, errors: int = 0, exit_code: int = 0) -> list[str]:
    return [v.what for v in judge(found, errors, 1200, exit_code) if not v.passed]


def test_noise_is_no_leak_and_neither_is_a_start_that_fills_caches() -> None:
    assert missed(rows()) == []
    filling = np.r_[np.linspace(120, 200, 4), 200 + np.random.default_rng(2).normal(size=16)]
    assert missed(rows(rss_mb=filling)) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rss_mb": 200 + np.random.default_rng(3).normal(size=20) + np.arange(20)}, "memory does not grow"),
        ({"descriptors": np.arange(60, 80)}, "descriptors are constant"),
        ({"threads": [12] * 19 + [13]}, "threads are constant"),
        ({"p50_ms": np.linspace(2, 4, 20)}, "median latency is flat"),
        ({"p99_ms": np.linspace(9, 19, 20)}, "99th percentile is flat"),
    ],
)
def test_what_grows_is_named(changes: dict[str, object], what: str) -> None:
    assert missed(rows(**changes)) == [what]


def test_one_error_and_a_bad_end_are_missed_goals() -> None:
    assert missed(rows(), errors=1, exit_code=-9) == ["no error", "ends with 0 on SIGTERM"]


def test_the_page_says_what_was_missed_and_the_picture_is_well_formed() -> None:
    verdicts = judge(rows(descriptors=np.arange(60, 80)), 0, 1200, 0)
    written = page(rows(), verdicts, [3.1, 5.2], {"machine": "any"})
    assert "Missed: descriptors are constant." in written
    assert "**missed** (slowest: 5.20 s)" in written
    assert "Everything held." in page(rows(), judge(rows(), 0, 1200, 0), [], {})
    ElementTree.fromstring(picture(rows(), 20))


@pytest.mark.parametrize(
    ("limit", "expected", "tries"),
    [(2000.0, 1000.0, 1), (1000.0, 1000.0, 1), (700.0, 687.5, 6), (10.0, 0.0, 6)],
)
def test_capacity_is_the_highest_rate_that_is_held(limit: float, expected: float, tries: int) -> None:
    tried: list[float] = []

    def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    assert highest_held(1000.0, holds) == expected
    assert len(tried) == tries


def test_a_rate_is_held_when_every_request_is_answered_in_time() -> None:
    held = Summary("a test", 1.0, 100, 100.0, 100.0, 1.0, 2.0, 40.0, 41.0, 42.0, {200: 100})
    assert is_held(held, 50.0)
    assert not is_held(held, 39.0)
    assert not is_held(replace(held, statuses={200: 99, 429: 1}), 50.0)
    assert not is_held(replace(held, statuses={200: 99}, errors={"unanswered": 1}), 50.0)
    assert not is_held(replace(held, requests=0, statuses={}, p99_ms=None), 50.0)
