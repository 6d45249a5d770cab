"""A build cannot be fooled by data that proves nothing, and says what is doubtful in all four places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.builder.models import mlp, save, weights
from tests.unit.builder.models import run as answer
from vernier.builder.cli import main
from vernier.package.manifest import Manifest, read_manifest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    save(mlp(), folder / "m.onnx")
    x = weights(400, 8, seed=5) * 3
    labels = answer(mlp(), {"x": x})[0][:, 0]
    labels = (labels > np.median(labels)).astype(np.int64)
    np.savez(folder / "zeros.npz", x=np.zeros((200, 8), np.float32))
    np.savez(folder / "c.npz", x=weights(200, 8, seed=6) * 3)
    np.savez(folder / "two.npz", x=weights(2, 8, seed=6) * 3)
    np.savez(folder / "e.npz", x=x, label=labels)
    np.savez(folder / "five.npz", x=x[:5], label=labels[:5])
    np.savez(folder / "chance.npz", x=x, label=np.random.default_rng(0).permutation(labels))
    np.savez(folder / "other.npz", x=x, truth=labels)
    photos = weights(9, 8, seed=7) * 3
    crops = (photos.repeat(11, axis=0)[:96] + weights(96, 8, seed=8) * 0.01).astype(np.float32)
    np.savez(folder / "crops.npz", x=crops, photo=np.array([f"photo {i // 11}" for i in range(96)]))
    return folder


def run(folder: Path, out: Path, calibration: str, evaluation: str = "", *more: str) -> int:
    data = ["--calibration", str(folder / calibration)]
    data += ["--eval", str(folder / evaluation)] if evaluation else []
    fixed = ["--name", "m", "--out", str(out), "--max-batch", "4", "--precision", "fp32,int8"]
    return main([str(folder / "m.onnx"), *fixed, *data, *more])


@pytest.mark.parametrize(
    ("calibration", "evaluation", "sentence"),
    [
        ("zeros.npz", "", "the calibration data spans no range"),
        ("zeros.npz", "e.npz", "the calibration data spans no range"),
        ("c.npz", "zeros.npz", "all 200 evaluation samples are copies of one"),
    ],
)
def test_zero_images_are_refused_with_eval_and_without(
    files: Path,
    tmp_path: Path,
    calibration: str,
    evaluation: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(files, tmp_path / "out", calibration, evaluation) == 1
    said = capsys.readouterr()
    assert sentence in said.err
    assert "samples as the model meets them" in said.err
    assert not (tmp_path / "out" / "m").exists()
    assert run(files, tmp_path / "out", calibration, evaluation, "--json") == 1
    assert sentence in json.loads(capsys.readouterr().out)["error"]


def test_fp32_alone_needs_no_evidence(files: Path, tmp_path: Path) -> None:
    assert run(files, tmp_path, "zeros.npz", "", "--precision", "fp32") == 0


@pytest.mark.parametrize(
    ("calibration", "evaluation", "more", "expected"),
    [
        ("c.npz", "e.npz", (), set()),
        ("c.npz", "five.npz", (), {"few_labels"}),
        ("two.npz", "e.npz", (), {"few_calibration_samples"}),
        ("e.npz", "e.npz", (), {"calibration_overlap"}),
        ("c.npz", "chance.npz", (), {"labels_at_chance", "few_labels"}),
        ("c.npz", "other.npz", (), {"unread_arrays"}),
        ("c.npz", "other.npz", ("--label-key", "truth"), set()),
        ("c.npz", "crops.npz", ("--group-key", "photo"), {"few_samples"}),
    ],
)
def test_what_is_doubtful_is_said_on_the_console_in_the_report_and_in_the_manifest(
    files: Path,
    tmp_path: Path,
    calibration: str,
    evaluation: str,
    more: tuple[str, ...],
    expected: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(files, tmp_path, calibration, evaluation, *more) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    package = tmp_path / "m" / "1"
    warnings = read_manifest(package).warnings
    assert {warning.code for warning in warnings} == expected
    report = json.loads((package / "report.json").read_text())
    assert report["warnings"] == [warning.model_dump() for warning in warnings]
    page = (package / "report.html").read_text("utf-8")
    assert ("What is doubtful about this evidence" in shown) == bool(expected)
    for warning in warnings:
        assert f"{warning.code}: {warning.message}" in shown
        assert f"<code>{warning.code}</code>" in page
    assert ("What is doubtful" in page) == bool(expected)
    assert main(["inspect", str(package)]) == 0
    inspected = capsys.readouterr().out
    assert all(warning.code in inspected for warning in warnings)


def test_crops_of_nine_photos_are_nine_samples(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, tmp_path, "c.npz", "crops.npz", "--group-key", "photo", "--json") == 0
    outcome = json.loads(capsys.readouterr().out)
    (warning,) = outcome["warnings"]
    assert "9 independent samples (96 in all)" in warning["message"]
    assert "at most 28 % of the answers" in warning["message"]
    assert json.loads((Path(outcome["package"]) / "report.json").read_text())["independent"] == 9
    # A bound that the crops keep and that nine photos cannot vouch for.
    int8 = outcome["variants"][1]["metrics"]["max_abs"]
    tight = ("--budget", f"max_abs<={1.8 * int8:.6f}", "--json")
    run(files, tmp_path, "c.npz", "crops.npz", *tight)
    loose = json.loads(capsys.readouterr().out)["variants"][1]
    run(files, tmp_path, "c.npz", "crops.npz", "--group-key", "photo", *tight)
    grouped = json.loads(capsys.readouterr().out)["variants"][1]
    assert loose["assignment"] == {"int8": 2}
    assert (grouped["status"], grouped["assignment"]) != ("pass", {"int8": 2})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--label-key", "truth"), "has no labels under 'truth'"),
        (("--group-key", "photo"), "has no array 'photo'"),
        (("--group-key", "x"), "names an array of one value per sample"),
    ],
)
def test_a_key_that_matches_nothing_is_bad_input(
    files: Path, tmp_path: Path, more: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, tmp_path, "c.npz", "e.npz", *more) == 2
    assert sentence in capsys.readouterr().err


def test_packages_of_before_load_without_warnings(files: Path, tmp_path: Path) -> None:
    assert run(files, tmp_path, "c.npz", "five.npz") == 0
    package = tmp_path / "m" / "1"
    stored = json.loads((package / "manifest.json").read_text())
    del stored["warnings"]
    assert Manifest.model_validate(stored).warnings == []
