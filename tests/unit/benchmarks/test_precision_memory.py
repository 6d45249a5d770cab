"""Peaks of memory are kept one for each number of samples, and the page says of them what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.precision import page, resnet50
from benchmarks.precision.memory import Peak, recall, remember, write_pictures


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
    assert "| 10,000 | 6.0 GB | 2.20 GB |" in shown
    assert "memory" not in shown.rpartition("Not measured")[2]
    remember(Peak(20_000, 600.0, 5_000_000_000), tmp_path / page.MEMORY)
    assert "20,000 samples is **over** the goal of 4 GB" in page.render(tmp_path)


def test_pictures_that_are_written_some_at_a_time_are_one_array(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures.npy", 130)
    found = np.load(tmp_path / "pictures.npy", mmap_mode="r")
    assert found.shape == (130, 3, resnet50.PIXELS, resnet50.PIXELS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:100], resnet50.pictures(100, 2))
    np.testing.assert_array_equal(found[100:], resnet50.pictures(30, 102))
