"""Peaks of memory are kept one for each number of samples, and the page says of them what they show."""

from __future__ import annotations

from pathlib import Path

from benchmarks.precision import page
from benchmarks.precision.memory import Peak, recall, remember


def test_a_peak_takes_the_place_of_an_older_one_with_as_many_samples(tmp_path: Path) -> None:
    path = tmp_path / page.MEMORY
    assert recall(path) == []
    for peak in (Peak(2000, 60.0, 3 << 30), Peak(500, 20.0, 1 << 30), Peak(2000, 50.0, 2 << 30)):
        remember(peak, path)
    assert recall(path) == [Peak(500, 20.0, 1 << 30), Peak(2000, 50.0, 2 << 30)]


def test_the_page_tells_whether_memory_grows_and_whether_the_goal_is_met(tmp_path: Path) -> None:
    assert "memory" in page.render(tmp_path).rpartition("Not measured")[2]
    remember(Peak(500, 20.0, 2_000_000_000), tmp_path / page.MEMORY)
    remember(Peak(10_000, 300.0, 2_200_000_000), tmp_path / page.MEMORY)
    shown = page.render(tmp_path)
    assert "10,000 samples is under the goal of 4 GB, and 1.10 times that with 500" in shown
    assert "| 10,000 | 6.0 GB | 2.20 GB | 300 s |" in shown
    assert "memory" not in shown.rpartition("Not measured")[2]
    remember(Peak(20_000, 600.0, 5_000_000_000), tmp_path / page.MEMORY)
    assert "20,000 samples is **over** the goal of 4 GB" in page.render(tmp_path)
