"""Plans of both examples, in every precision, built without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.packages import example
from vernier.builder.plans.plan import PlanOptions
from vernier.builder.plans.plan_package import add_plans
from vernier.package.integrity import open_package

DIMS = {
    "recommender": {"batch": (1, 64, 512)},
    "speech": {"batch": (1, 16, 64), "frames": (10, 100, 200)},
}


@pytest.mark.parametrize("folder", list(DIMS))
def test_every_variant_of_an_example_becomes_a_plan(folder: str, tmp_path: Path) -> None:
    package = example(tmp_path, folder, folder, DIMS[folder])
    assert package is not None
    manifest = open_package(package)
    options = PlanOptions("tensorrt-rtx", "", compute_capabilities=("8.9",))
    entries, notes = add_plans(package, manifest, options)
    assert [entry.precision for entry in entries] == ["fp32", "fp16", "int8"]
    assert notes == []
    assert all((package / entry.path).stat().st_size == entry.bytes > 10_000 for entry in entries)
