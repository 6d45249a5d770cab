"""What the report of a real build says agrees with its numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.unit.builder.models import make_model, run, save, weights
from vernier.builder.cli import main
from vernier.builder.searching.latency import Latencies, fastest, relative_time


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small convolution whose answers are [samples, 3, 4, 4], judged on a third of the calibration data."""
    folder = tmp_path_factory.mktemp("report")
    model = make_model(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Conv", ["r", "v"], ["y"], pads=[1, 1, 1, 1]),
        ],
        inputs={"x": (TensorProto.FLOAT, ["batch", 2, 4, 4])},
        outputs={"y": (TensorProto.FLOAT, ["batch", 3, 4, 4])},
        constants={"w": weights(8, 2, 3, 3), "b": weights(8, seed=1), "v": weights(3, 8, 3, 3, seed=2)},
    )
    save(model, folder / "m.onnx")
    np.savez(folder / "c.npz", x=weights(900, 2, 4, 4, seed=3) * 3)
    arguments = ["--name", "m", "--out", str(folder / "engines"), "--max-batch", "4"]
    data = ["--calibration", str(folder / "c.npz"), "--budget", "max_abs<=0.5"]
    assert main([str(folder / "m.onnx"), *arguments, *data, "--precision", "fp32,tf32,fp16,int8"]) == 0
    package = folder / "engines" / "m" / "1"
    return package, json.loads((package / "report.json").read_text())


def test_sentences_compare_the_medians_that_the_table_shows(built: tuple[Path, dict[str, Any]]) -> None:
    variants = {v["precision"]: v for v in built[1]["variants"]}
    chosen = variants[built[1]["chosen"]]
    checked = 0
    for variant in variants.values():
        for ratio in re.findall(r"takes ([\d.]+) times as long", variant["explanation"]):
            assert float(ratio) == pytest.approx(
                relative_time(variant["latency_ms"], chosen["latency_ms"]), abs=0.006
            )
            checked += 1
        for bucket, median in variant["latency_ms"].items():
            low, high = variant["spread_ms"][bucket]
            assert low <= median <= high
            checked += 1
    assert checked >= 9


def test_the_median_decides() -> None:
    # By the lower quartile fp16 would be the faster.
    latencies = Latencies({"fp32": {1: 1.0}, "fp16": {1: 1.2}}, {"fp32": {1: 0.9}, "fp16": {1: 0.5}}, {})
    assert fastest(latencies, ["fp32", "fp16"]) == "fp32"


def test_what_no_gpu_has_run_is_emulated(built: tuple[Path, dict[str, Any]]) -> None:
    package, report = built
    tf32 = next(v for v in report["variants"] if v["precision"] == "tf32")
    assert tf32["status"] == "emulated"
    assert tf32["explanation"].startswith("emulated, until a GPU has run it: ")
    assert any("no GPU has run it yet: tf32" in sentence for sentence in report["decision"])
    page = (package / "report.html").read_text("utf-8")
    assert '<span class="chip emulated">emulated</span>' in page


def test_the_worst_values_stand_in_the_outputs_own_dimensions(built: tuple[Path, dict[str, Any]]) -> None:
    found = built[1]["samples"]["int8"]
    places = [place for sample in found for place, _, _ in sample["values"]["y"]]
    assert all(len(place) == 3 and place < [3, 4, 4] and max(place[1:]) < 4 for place in places)
    # Samples are counted as they stand in the data, of which every third or so judges.
    assert max(sample["index"] for sample in found) < 900
    text = ", ".join(map(str, places[0]))
    assert f">{text}<" in (built[0] / "report.html").read_text("utf-8")


def test_worst_samples_are_numbered_as_in_the_data(
    tmp_path: Path, built: tuple[Path, dict[str, Any]]
) -> None:
    folder = built[0].parents[2]
    x = np.load(folder / "c.npz")["x"]
    (place, exact, _), *_ = built[1]["samples"]["int8"][0]["values"]["y"]
    index = built[1]["samples"]["int8"][0]["index"]
    answers = run(folder / "m.onnx", {"x": x[index : index + 1]})[0]
    assert answers[(0, *place)] == pytest.approx(exact, rel=1e-4)


def test_plain_int8_stands_beside_ours(built: tuple[Path, dict[str, Any]]) -> None:
    package, report = built
    plain = report["plain"]
    assert plain["term"] == "max_abs<=0.5"
    assert plain["nodes"] == 2
    assert plain["value"] > 0
    assert plain["used"] == pytest.approx(plain["value"] / 0.5)
    assert "For comparison, plain INT8 (all 2 nodes" in (package / "report.html").read_text("utf-8")


def test_what_was_skipped_takes_one_line(
    built: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = built[0].parents[2]
    arguments = ["--name", "a", "--out", str(folder / "engines"), "--max-batch", "4", "--precision", "auto"]
    assert main([str(folder / "m.onnx"), *arguments, "--calibration", str(folder / "c.npz")]) == 0
    shown = capsys.readouterr().out
    assert "not built: tf32 (TF32 is a mode of NVIDIA GPUs" in shown
    assert not re.search(r"│ (tf32|bf16|fp8)", shown)
    page = (folder / "engines" / "a" / "1" / "report.html").read_text("utf-8")
    assert "tf32 not built: TF32 is a mode" in page
    assert "<strong>tf32</strong>" not in page
