"""What is known of a variant's speed before it has run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.packages import mlp_model, write_package
from vernier.package.integrity import open_package
from vernier.serving.models.loading import OnnxRuntimeLoader, expected_curves


def test_a_curve_measured_on_this_device_goes_before_the_build_s_and_that_before_none(tmp_path: Path) -> None:
    package = write_package(tmp_path, variants={"fp16": mlp_model(), "int8": mlp_model()})
    file = package / "manifest.json"
    fields = json.loads(file.read_text())
    for precision in ("fp32", "fp16"):
        fields["variants"][precision]["latency_ms"] = {
            "onnxruntime": {"1": 0.5, "16": 2.0},
            "tensorrt": {"1": 9},
        }
    file.write_text(json.dumps(fields))
    manifest = open_package(package)
    engines = OnnxRuntimeLoader(lambda manifest: 1).load(package, manifest, "auto")
    try:
        engines.curves["fp16"] = {1: 0.25}
        assert expected_curves(manifest, engines) == {
            "fp32": pytest.approx({1: 0.0005, 16: 0.002}),
            "fp16": {1: 0.25},
            "int8": {},
        }
    finally:
        engines.close()
