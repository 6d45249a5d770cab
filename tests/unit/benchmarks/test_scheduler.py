"""What the scheduler's benchmark makes of what it saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.load import Record
from benchmarks.scheduler import page
from benchmarks.scheduler.rounds import BURST_AT_S, BURST_RUN_S, BURST_S, recovery
from benchmarks.scheduler.virtual import simulate


def record(due_s: list[float], latency_ms: list[float], status: list[int]) -> Record:
    n = len(due_s)
    return Record(
        due_s=np.array(due_s),
        latency_s=np.array(latency_ms) / 1e3,
        status=np.array(status, np.int16),
        right=np.full(n, -1, np.int8),
        lag_s=np.zeros(n),
        waited=np.zeros(n, np.bool_),
        window_s=(0.0, BURST_RUN_S),
        is_open=True,
    )


def test_recovery_is_until_the_last_request_that_missed() -> None:
    end = BURST_AT_S + BURST_S
    due = [1.0, BURST_AT_S + 0.1, end + 0.1, end + 0.4, end + 0.5, end + 2.0]
    calm = recovery(record(due, [9] * 6, [200] * 6), 20)
    assert (calm["recovery_ms"], calm["missed_in_burst"]) == (0, 0)
    late = recovery(record(due, [9, 30, 30, 9, 9, 9], [200] * 6), 20)
    assert late["recovery_ms"] == pytest.approx(100)
    assert late["missed_in_burst"] == 1
    refused = recovery(record(due, [9, 9, 9, 1, 9, 12], [200, 200, 200, 429, 200, 200]), 20)
    assert refused["recovery_ms"] == pytest.approx(400)
    assert (refused["p99_before_ms"], refused["p99_later_ms"]) == (9, 12)


@pytest.mark.parametrize("policy", ["vernier", "fixed 2 ms"])
def test_the_same_load_runs_in_virtual_time(policy: str) -> None:
    curve = {1: 0.004, 2: 0.005, 4: 0.007, 8: 0.011}
    found = simulate(curve, 0.5 * 8 / 0.011, 5.0, 1, 0.044, policy, 8)
    assert 4 <= found["p50_ms"] <= found["p99_ms"] <= 44
    assert found["refused"] == 0


def test_a_missed_goal_is_written_down_as_missed(tmp_path: Path) -> None:
    circumstances = {"rounds": 5, "seconds": 1, "date": "2026-01-01", "machine": "m", "versions": "v"}
    part = {"batch": 8, "batch_ms": 5.0, "bare": [100.0], "served": [90.0], "whole": [96.0]}
    part |= {"ratio": 0.9, "whole_ratio": 0.96}
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.update(path, {"throughput": {"heavy": part, "measured": circumstances}})
    text = path.read_text()
    assert "| ≥ 95 % | 90.0% | **missed** |" in text
    assert "| ≥ 95 % | 96.0% | met |" in text
    assert "| 90.0% | 96.0% |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="lacks the marks"):
        page.update(Path(__file__), {})


@pytest.mark.parametrize(
    ("capacities", "share", "shown"),
    [
        ([(100.0, 60.0)], "90.0%", "| 72 | 100 → 60 | 90.0% |"),
        ([(100.0, 60.0), (60.0, 180.0), (90.0, 150.0)], "60.0%", "| 72 | 90 → 150 | 60.0% |"),
    ],
)
def test_goodput_is_held_against_the_capacity_around_each_overload(
    capacities: list[tuple[float, float]], share: str, shown: str
) -> None:
    load = {
        "goodput": 72.0,
        "p50_ms": 9.0,
        "p99_ms": 20.0,
        "requests": 3000,
        "seconds": 10,
        "statuses": {"200": 720},
    }
    around = [{"capacity_before": before, "capacity_after": after} for before, after in capacities]
    overload = [{**load, **found, "memory_before_mib": 1.0, "memory_after_mib": 1.0} for found in around]
    names = ("vernier", "fixed 2 ms")
    burst = dict.fromkeys(("recovery_ms", "missed_in_burst", "p99_before_ms", "p99_later_ms"), 0.0)
    text = page.render(
        {
            "loads": {
                "model": "m",
                "capacity": 120.0,
                "objective_ms": 40.0,
                "curve_ms": {"1": 5.0},
                "poisson": [{"share": 0.5, "policy": name, **load} for name in names],
                "virtual": [{"share": 0.5, "policy": name, "refused": 0.0, **load} for name in names],
                "bursts": {name: [burst] for name in names},
                "dispatched": {name: {"full": 1} for name in names},
                "overload": overload,
                "measured": {
                    "rounds": 5,
                    "seconds": 1,
                    "date": "2026-01-01",
                    "machine": "m",
                    "versions": "v",
                },
            }
        }
    )
    assert f"| goodput at 3 × capacity | ≥ 90 % | {share} |" in text
    assert shown in text
