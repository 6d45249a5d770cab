"""The GPU page: rows measured again take the place of the old ones, and several GPUs are compared with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import put_row, several_table, tables

STORED = next((Path(__file__).parents[3] / "benchmarks" / "gpu").glob("results-*.json"))


def pools(*rates: float) -> list[dict[str, float]]:
    return [{"per_s": rate, "slots": slots} for slots, rate in enumerate(rates, 2)]


def row(gpus: int, *rates: float) -> dict[str, Any]:
    return {
        "network": "resnet50",
        "precision": "fp16",
        "batch": 64,
        "gpus": gpus,
        "pool": pools(*rates),
        "pool_filled": pools(*(rate / 2 for rate in rates)),
        "machine": {"gpu": "NVIDIA H100", "date": "2026-11-25"},
    }


def test_a_row_measured_again_takes_the_old_ones_place() -> None:
    rows = [row(1, 1.0), row(2, 2.0)]
    put_row(rows, row(1, 3.0))
    put_row(rows, {**row(1, 4.0), "precision": "int8"})
    assert [r["pool"][0]["per_s"] for r in rows] == [3.0, 2.0, 4.0]


def test_several_gpus_stand_beside_one() -> None:
    lines = several_table([row(1, 100.0, 110.0, 105.0), row(2, 190.0, 209.0, 200.0)])
    assert lines[2].split(" | ")[1:6] == ["1", "6,400", "7,040", "6,720", "1.00"]
    assert lines[3].split(" | ")[1:6] == ["2", "12,160", "13,376", "12,800", "1.90"]


def test_the_page_says_where_a_row_was_measured_elsewhere() -> None:
    results = json.loads(STORED.read_text())
    page = "\n".join(tables({**results, "several": [row(1, 100.0, 110.0, 105.0)]}))
    assert "Several GPUs in one process, ResNet-50, batch 64 (NVIDIA H100, 2026-11-25)" in page
