"""The command line: exit codes, one sentence for each kind of bad input, JSON for machines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.unit.builder.models import mlp, save, weights
from vernier.builder.cli import main
from vernier.builder.resume import CalibrationState
from vernier.errors import BuildError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save(mlp(), folder / "m.onnx")
    np.savez(folder / "c.npz", x=weights(96, 8) * 3)
    labels = (weights(96, seed=3) > 0).astype(np.int64)
    np.savez(folder / "e.npz", x=weights(96, 8, seed=5) * 3, label=labels, target=1 - labels)
    assert run(folder, "m.onnx", "--precision", "fp32,int8", "--calibration", "c.npz", "--eval", "c.npz") == 0
    return folder


def run(folder: Path, *arguments: str) -> int:
    """Runs a build of `folder`'s files; names of files in it become paths."""
    known = {p.name for p in folder.iterdir() if p.is_file()}
    given = [str(folder / a) if a in known else a for a in arguments]
    if arguments[0] not in ("inspect", "compare"):
        given += ["--name", "m", "--out", str(folder / "engines"), "--max-batch", "4"]
    return main(given)


def test_a_build_prints_a_table(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "m.onnx", "--precision", "fp32,fp16", "--eval", "e.npz") == 0
    out = capsys.readouterr().out
    for word in (
        "variant",
        "size",
        "ms at 1",
        "ms at 4",
        "auc",
        "gate",
        "fp16",
        "pass",
        "onnxruntime serves",
    ):
        assert word in out


def test_json_is_one_object_and_nothing_else(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "m.onnx", "--precision", "fp32", "--eval", "e.npz", "--json") == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["name"] == "m"
    assert [v["precision"] for v in outcome["variants"]] == ["fp32"]
    assert outcome["variants"][0]["latency_ms"].keys() == {"1", "2", "4"}
    assert Path(outcome["package"]).is_dir()


def test_a_refusal_ends_with_1_and_says_why(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("m.onnx", "--precision", "fp32,int8", "--calibration", "c.npz", "--eval", "e.npz")
    assert run(files, *arguments, "--budget", "max_abs<=1e-9", "--no-search") == 1
    out = capsys.readouterr().out
    assert "refused" in out
    assert "the budget is max_abs<=1e-09" in out


def test_a_budget_that_fp32_misses_builds_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(files.rglob("*"))
    assert run(files, "m.onnx", "--precision", "fp32", "--eval", "e.npz", "--budget", "auc>=0.99") == 1
    assert "FP32 itself misses the budget" in capsys.readouterr().err
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("absent.onnx",), "cannot read absent.onnx"),
        (("m.onnx", "--precision", "int4", "--eval", "e.npz"), "'int4' is no precision"),
        (("m.onnx", "--precision", "fp16"), "without data nothing can be proven"),
        (("m.onnx", "--precision", "int8", "--eval", "e.npz"), "need calibration data: give --calibration"),
        (("m.onnx", "--precision", "fp16", "--eval", "nothing.npz"), "there is no data at 'nothing.npz'"),
        (("m.onnx", "--precision", "fp16", "--eval", "m.onnx"), "is not a whole .npz file"),
        (("e.npz",), "is not an ONNX model but a zip archive"),
        (("m.onnx", "--budget", "auc"), "'auc' is no budget"),
        (("m.onnx", "--budget", "auc>=99%", "--eval", "c.npz"), "needs labels"),
        (("m.onnx", "--shape", "x=4"), "--shape"),
        (("m.onnx", "--calibration-method", "guess"), "--calibration-method takes minmax, entropy"),
        (("m.onnx", "--quantizer", "other"), "--quantizer takes vernier, modelopt"),
        (("m.onnx", "--quantizer", "modelopt"), "install it with pip install 'vernier[modelopt]'"),
        (("m.onnx", "--plans", "onnxruntime"), "--plans takes tensorrt or tensorrt-rtx"),
        (("m.onnx", "--sm", "89"), "add --plans tensorrt-rtx"),
        (("m.onnx", "--calibration-cache", "c.npz", "--eval", "c.npz"), "calibration cache"),
        (("inspect", "absent"), "is no folder"),
        (("compare", "absent", "m.onnx"), "there is no model at 'absent'"),
        (("compare", "m.onnx", "m.onnx"), "give --data"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(
    files: Path, arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, *arguments) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("build_engine.py: ")
    assert "Traceback" not in said.err


@pytest.mark.parametrize("precision", ["fp32", "fp32,int8", "auto"])
@pytest.mark.parametrize("resume", ["m.onnx", "c.npz", "e.npz", "engines"])
def test_a_file_to_resume_from_that_is_no_state_is_refused_and_kept(
    files: Path, precision: str, resume: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in files.rglob("*") if p.is_file()}
    arguments = ("m.onnx", "--precision", precision, "--calibration", "c.npz", "--eval", "e.npz")
    assert run(files, *arguments, "--resume", str(files / resume)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{resume} is a folder" in said or f"{resume} holds no calibration state" in said
    assert "give --resume the file that an interrupted build left" in said
    assert {p: p.read_bytes() for p in files.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("precision", ["fp32,int8", "auto"])
def test_the_calibration_of_another_build_is_refused_and_kept(
    files: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    CalibrationState(state, "another build").write({"done": np.array(1)})
    kept = state.read_bytes()
    packages = sorted(files.rglob("*"))
    arguments = ("m.onnx", "--precision", precision, "--calibration", "c.npz", "--eval", "e.npz")
    assert run(files, *arguments, "--resume", str(state)) == 2
    assert "remove it to start anew, or give --resume another path" in capsys.readouterr().err
    assert state.read_bytes() == kept
    assert sorted(files.rglob("*")) == packages


def test_bad_input_is_json_too_when_asked(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "absent.onnx", "--json") == 2
    assert "cannot read" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("arguments", [["m.onnx"], ["m.onnx", "--name"], ["--nonsense", "m.onnx"], []])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Usage" in said or "Error" in said


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("build", "inspect", "compare"):
        assert command in shown


def test_inspect_shows_and_verifies(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = files / "engines" / "m" / "1"
    assert run(files, "inspect", str(package), "--nodes", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    nodes = Counter(report["variants"]["int8"]["nodes"].values())
    assignment = report["variants"]["int8"]["assignment"]
    assert nodes == {{"fp16": "float16"}.get(kind, kind): count for kind, count in assignment.items()}
    assert set(report["variants"]["fp32"]["nodes"].values()) == {"float"}
    assert report["variants"]["int8"]["bytes"] == (package / "int8.onnx").stat().st_size
    assert run(files, "inspect", str(package)) == 0
    shown = capsys.readouterr().out
    for word in ("m version 1", "float32", "[batch, 8]", "int8", "files verified"):
        assert word in shown
    golden = package / "golden.npz"
    whole = golden.read_bytes()
    golden.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert run(files, "inspect", str(package)) == 2
        assert "sha256" in capsys.readouterr().err
    finally:
        golden.write_bytes(whole)


def test_compare_measures_and_holds_a_budget(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = str(files / "engines" / "m" / "1")
    assert run(files, "compare", "m.onnx", f"{package}:int8", "--data", "e.npz", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["outputs"]["y"]["max_abs"] < 0.2
    assert found["samples"] == 96
    assert set(found["tasks"]["auc"]) == {"a", "b"}
    assert run(files, "compare", package, "m.onnx") == 0
    assert "rel_l2" in capsys.readouterr().out
    budget = ("--budget", "max_abs<=1e-9")
    assert run(files, "compare", f"{package}:fp32", f"{package}:int8", *budget) == 1
    assert "refused" in capsys.readouterr().out
    assert run(files, "compare", f"{package}:fp32", f"{package}:fp32", *budget) == 0
    assert run(files, "compare", f"{package}:fp32", f"{package}:bf16") == 2
    assert "has no variant 'bf16'" in capsys.readouterr().err


def test_labels_may_have_another_name(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = []
    for key in ("label", "target"):
        assert (
            run(files, "m.onnx", "--precision", "fp32", "--eval", "e.npz", "--label-key", key, "--json") == 0
        )
        values.append(json.loads(capsys.readouterr().out)["variants"][0]["metrics"]["auc@y"])
    assert values[0] == pytest.approx(1 - values[1])


def test_every_error_of_the_builder_has_an_exit_code() -> None:
    def below(kind: type[BuildError]) -> list[type[BuildError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    assert {kind.exit_code for kind in below(BuildError)} == {1, 2}
