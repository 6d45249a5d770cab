"""One variant's failure never costs the others theirs, and the exit code says whose fault it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.unit.builder.models import make_model, mlp, save, weights
from vernier.builder.cli import main
from vernier.builder.searching.candidates import VariantCandidate, VariantEvaluator
from vernier.engine.ort import OnnxRuntimeExecutor
from vernier.errors import BuildError, DataChanged, EngineError
from vernier.package.integrity import open_package


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=weights(128, 8) * 3)
    np.savez(tmp_path / "e.npz", x=weights(300, 8, seed=5) * 3)
    return tmp_path


def build(folder: Path, precision: str, *more: str, model: str = "m.onnx") -> int:
    data = ["--calibration", str(folder / "c.npz"), "--eval", str(folder / "e.npz")]
    fixed = ["--name", "m", "--out", str(folder / "engines"), "--max-batch", "4", "--precision", precision]
    return main([str(folder / model), *fixed, *data, *more])


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """INT8 fails after its file was written."""
    real = VariantEvaluator.build

    def build_(self: VariantEvaluator, precision: str, folder: Path) -> VariantCandidate:
        found = real(self, precision, folder)
        if precision == "int8":
            raise error
        return found

    monkeypatch.setattr(VariantEvaluator, "build", build_)


@pytest.mark.parametrize("precision", ["fp32,int8,fp16", "auto"])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (IndexError("list index out of range"), 3, "IndexError: list index out of range"),
        (MemoryError(), 3, "MemoryError"),
        (BuildError("the graph cannot be had"), 2, "the graph cannot be had"),
    ],
)
def test_the_others_are_published_when_int8_fails(
    files: Path,
    precision: str,
    error: Exception,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, error)
    chosen_by_itself = precision == "auto" and code == 2
    assert build(files, precision, "--json") == (0 if chosen_by_itself else code)
    outcome = json.loads(capsys.readouterr().out)
    by_name = {v["precision"]: v for v in outcome["variants"]}
    assert (by_name["fp32"]["status"], by_name["fp16"]["status"]) == ("pass", "pass")
    assert by_name["int8"]["status"] == ("skipped" if chosen_by_itself else "failed")
    assert said in by_name["int8"]["reason"]
    assert ("fault" in by_name["int8"]) == (code == 3)
    if code == 3:
        assert "Traceback" in by_name["int8"]["fault"]["traceback"]
        assert by_name["int8"]["fault"]["versions"].keys() >= {"vernier", "onnxruntime", "python"}
    package = Path(outcome["package"])
    assert {"fp32", "fp16"} <= set(open_package(package).variants)
    assert not list(package.glob("int8.*"))
    report = json.loads((package / "report.json").read_text())
    assert said in next(v["explanation"] for v in report["variants"] if v["precision"] == "int8")


def test_a_fault_is_shown_to_people_with_what_to_report(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyError("x"))
    assert build(files, "fp32,int8") == 3
    shown = capsys.readouterr().out
    for word in (
        "failed",
        "a fault in Vernier, not in the input",
        "please report",
        "onnxruntime",
        "Traceback",
    ):
        assert word in shown


def test_int8_of_a_model_without_weights_costs_fp16_nothing(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(
        [helper.make_node("Tanh", ["x"], ["y"])],
        inputs={"x": (TensorProto.FLOAT, ["batch", 8])},
        outputs={"y": (TensorProto.FLOAT, ["batch", 8])},
    )
    save(model, files / "tanh.onnx")
    assert build(files, "fp32,fp16,int8", model="tanh.onnx") == 2
    shown = capsys.readouterr().out
    assert "could run in int8: build it in fp16 instead" in shown
    assert {"fp32", "fp16"} == set(open_package(files / "engines" / "m" / "1").variants)


def test_a_variant_that_cannot_be_loaded_to_be_served_costs_the_others_nothing(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = OnnxRuntimeExecutor.__init__

    def init(self: OnnxRuntimeExecutor, path: Path, **options: object) -> None:
        if options["precision"] == "int8":
            raise EngineError("there is no kernel for it")
        real(self, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxRuntimeExecutor, "__init__", init)
    assert build(files, "fp32,fp16,int8", "--json") == 1
    by_name = {v["precision"]: v for v in json.loads(capsys.readouterr().out)["variants"]}
    assert (by_name["fp16"]["status"], by_name["int8"]["status"]) == ("pass", "emulated")
    assert "kept for GPUs, as which it passes; there is no kernel for it" in by_name["int8"]["reason"]


@pytest.mark.parametrize("error", [DataChanged("e.npz changed"), OSError(5, "Input/output error")])
def test_what_concerns_the_whole_build_ends_it(
    files: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    assert build(files, "fp32,fp16,int8") == 2
    assert not (files / "engines" / "m").exists()


def test_int8_without_calibration_data_is_bad_input_before_anything_is_built(files: Path) -> None:
    arguments = ["--name", "m", "--out", str(files / "engines"), "--precision", "fp32,int8"]
    assert main([str(files / "m.onnx"), *arguments, "--eval", str(files / "e.npz")]) == 2
    assert not (files / "engines" / "m").exists()


@pytest.mark.parametrize("json_", [False, True])
def test_a_fault_elsewhere_ends_with_3_and_what_to_report(
    files: Path, json_: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_(self: VariantEvaluator, precision: str, folder: Path) -> VariantCandidate:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(VariantEvaluator, "build", build_)
    assert build(files, "fp32", *(["--json"] if json_ else [])) == 3
    said = capsys.readouterr()
    if json_:
        answer = json.loads(said.out)
        text, fault = answer["error"], answer["fault"]["traceback"]
        assert answer["fault"]["versions"]["vernier"]
    else:
        text, fault = said.err, said.err
    assert (
        "a fault in Vernier, not in the input: ZeroDivisionError: division by zero; please report it" in text
    )
    assert "Traceback" in fault
    assert not (files / "engines" / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["m.onnx", "--json"], "Missing option '--name'"),
        (["--nonsense", "m.onnx", "--json"], "No such option"),
        (["m.onnx", "--name", "m", "--max-batch", "many", "--json"], "max-batch"),
        (["inspect", "--json"], "Missing argument"),
        (["absent.onnx", "--name", "m", "--json"], "cannot read absent.onnx"),
    ],
)
def test_json_is_printed_on_every_error(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert sentence in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("json_", [False, True])
def test_an_interruption_says_what_is_left(
    files: Path, json_: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert build(files, "fp32,int8", *(["--json"] if json_ else [])) == 130
    said = capsys.readouterr()
    text = json.loads(said.out)["error"] if json_ else said.err
    assert "interrupted: nothing was published, and the temporary files in" in text
    assert not (files / "engines" / "m").exists()


def test_an_interruption_names_the_state_to_go_on_from(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = files / "state"

    def build_(self: VariantEvaluator, precision: str, folder: Path) -> VariantCandidate:
        state.write_bytes(b"state")
        raise KeyboardInterrupt

    monkeypatch.setattr(VariantEvaluator, "build", build_)
    assert build(files, "fp32,int8", "--resume", str(state)) == 130
    assert (
        f"{state} holds the calibration so far, and the same command goes on there" in capsys.readouterr().err
    )
