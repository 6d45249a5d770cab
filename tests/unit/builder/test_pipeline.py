"""A build ends in a whole, verified package or in nothing at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.unit.builder.models import make_model, mlp, old_cnn, run, save, weights
from vernier.builder.pipeline import build
from vernier.builder.plans.plan import PlanOptions
from vernier.builder.progress import NoProgress
from vernier.builder.request import (
    BuildRequest,
    parse_pad_values,
    parse_precisions,
    parse_sequence,
)
from vernier.errors import BuildError
from vernier.package.golden import load_golden
from vernier.package.integrity import open_package
from vernier.package.manifest import Manifest


def data(path: Path, count: int = 96, labels: bool = True, seed: int = 1) -> str:
    """Inputs of `mlp`, labelled by the model itself, so that it is right about all of them but for noise."""
    x = weights(count, 8, seed=seed) * 3
    arrays = {"x": x}
    if labels:
        score = run(mlp(), {"x": x})[0][:, 0]
        arrays["label"] = (score + weights(count, seed=seed + 1) * 0.05 > np.median(score)).astype(np.int64)
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def request_(tmp_path: Path) -> BuildRequest:
    return BuildRequest(
        model=save(mlp(), tmp_path / "m.onnx"),
        name="ranker",
        out=tmp_path / "engines",
        precisions=("fp32", "fp16", "int8"),
        calibration=data(tmp_path / "c.npz", labels=False),
        evaluation=data(tmp_path / "e.npz", seed=5),
        max_batch=8,
    )


def change(request: BuildRequest, **fields: object) -> BuildRequest:
    return BuildRequest(**{**request.__dict__, **fields})  # type: ignore[arg-type]


def test_the_package_holds_everything_and_its_hashes_are_right(request_: BuildRequest) -> None:
    outcome = build(request_, NoProgress())
    assert outcome.exit_code == 0
    assert outcome.package == request_.out / "ranker" / "1"
    manifest = open_package(outcome.package)
    assert set(manifest.variants) == {"fp32", "fp16", "int8"}
    assert manifest.decision["onnxruntime"] in manifest.variants
    on_disk = {p.relative_to(outcome.package).as_posix() for p in outcome.package.rglob("*") if p.is_file()}
    assert on_disk == {*manifest.files, "manifest.json"}
    assert {"calibration.cache", "calibration.json", "golden.npz", "report.html", "report.json"} < on_disk
    for variant in manifest.variants.values():
        assert variant.gates["onnxruntime"].passed
        assert set(variant.latency_ms["onnxruntime"]) == {"1", "2", "4", "8"}
        assert (outcome.package / variant.files[0]).is_file()
    assert manifest.batching.buckets == [1, 2, 4, 8]
    assert {"vernier", "onnx", "onnxruntime", "numpy", "python"} <= set(manifest.tools)
    assert manifest.calibration_sha256
    assert manifest.evaluation_sha256
    assert manifest.variants["int8"].assignment == {"int8": 2}
    assert not list(request_.out.rglob(".building-*"))


def test_the_fp32_variant_answers_as_the_model_does(request_: BuildRequest) -> None:
    package = build(change(request_, precisions=("fp32",)), NoProgress()).package
    x = weights(5, 8, seed=33)
    expected = run(request_.model, {"x": x})[0]
    np.testing.assert_allclose(run(package / "fp32.onnx", {"x": x})[0], expected, atol=1e-6)


def test_golden_vectors_are_real_samples_with_the_answers_of_fp32(request_: BuildRequest) -> None:
    outcome = build(request_, NoProgress())
    golden = load_golden(outcome.package / "golden.npz")
    assert 16 <= golden.samples <= 64
    evaluation = np.load(str(request_.evaluation))["x"]
    assert all(any((row == other).all() for other in evaluation) for row in golden.inputs["x"])
    np.testing.assert_allclose(
        golden.outputs["y"], run(outcome.package / "fp32.onnx", golden.inputs)[0], atol=1e-6
    )


def test_versions_count_up(request_: BuildRequest) -> None:
    fast = change(request_, precisions=("fp32",))
    assert [build(fast, NoProgress()).manifest.version for _ in range(3)] == [1, 2, 3]
    (request_.out / "ranker" / "7").mkdir()
    assert build(fast, NoProgress()).package.name == "8"


def test_a_refused_variant_is_left_out_and_the_others_are_published(request_: BuildRequest) -> None:
    outcome = build(change(request_, budget="max_abs<=0.0003", search=False), NoProgress())
    status = {v.precision: v.status for v in outcome.variants}
    assert status["fp32"] == "pass"
    assert status["int8"] == "refused"
    assert outcome.exit_code == 1
    manifest = open_package(outcome.package)
    assert "int8" not in manifest.variants
    assert not (outcome.package / "int8.onnx").exists()
    reason = next(v.reason for v in outcome.variants if v.precision == "int8")
    assert "max_abs" in reason


def test_a_search_gives_nodes_back_instead_of_refusing(request_: BuildRequest) -> None:
    everything = build(change(request_, budget="max_abs<=0.9"), NoProgress())
    error = next(v.gate.metrics["max_abs"] for v in everything.variants if v.precision == "int8" and v.gate)
    tight = build(change(request_, budget=f"max_abs<={error * 0.8:.6f}"), NoProgress())
    int8 = next(v for v in tight.variants if v.precision == "int8")
    assert int8.status == "refused" or int8.assignment.get("fp16", 0) >= 1


def test_what_so_few_samples_cannot_prove_is_refused_unless_the_budget_is_taken_at_its_word(
    request_: BuildRequest,
) -> None:
    wide = build(change(request_, precisions=("fp32", "int8"), budget="max_abs<=0.9"), NoProgress())
    gates = wide.manifest.variants["int8"].gates
    barely = f"max_abs<={max(gate.metrics['max_abs'] for gate in gates.values()) * 1.01:.6f}"
    narrow = change(request_, precisions=("fp32", "int8"), budget=barely)
    at_its_word = build(change(narrow, search=False), NoProgress())
    assert at_its_word.manifest.variants["int8"].assignment == {"int8": 2}
    doubtful = next(v for v in build(narrow, NoProgress()).variants if v.precision == "int8")
    assert doubtful.assignment.get("int8", 0) < 2 or doubtful.status == "refused"
    if doubtful.status == "refused":
        assert "evaluate on more" in doubtful.reason


def test_auto_takes_the_fastest_inside_the_budget_and_tells_about_the_others(request_: BuildRequest) -> None:
    outcome = build(change(request_, precisions=("auto",)), NoProgress())
    assert outcome.exit_code == 0
    chosen = outcome.manifest.decision["onnxruntime"]
    assert chosen in outcome.manifest.variants
    assert len(outcome.variants) >= 3


def test_without_evaluation_data_calibration_data_is_kept_back(request_: BuildRequest) -> None:
    outcome = build(change(request_, evaluation=None, precisions=("fp32", "int8")), NoProgress())
    assert any("kept back for the gate" in note for note in outcome.notes)
    assert outcome.manifest.variants["fp32"].gates["onnxruntime"].samples == 32


def test_without_any_data_fp32_alone_is_built(request_: BuildRequest) -> None:
    bare = change(request_, calibration=None, evaluation=None)
    with pytest.raises(BuildError, match="without data nothing can be proven"):
        build(bare, NoProgress())
    outcome = build(change(bare, precisions=("fp32",)), NoProgress())
    assert load_golden(outcome.package / "golden.npz").samples == 16


def test_int8_without_calibration_data_is_refused_and_leaves_nothing(request_: BuildRequest) -> None:
    with pytest.raises(BuildError, match="need calibration data: give --calibration"):
        build(change(request_, calibration=None, precisions=("fp32", "int8")), NoProgress())
    assert not request_.out.exists() or not list(request_.out.iterdir())


def test_a_calibration_cache_reproduces_the_graph_bit_for_bit(request_: BuildRequest) -> None:
    first = build(request_, NoProgress()).package
    again = build(change(request_, calibration_cache=first / "calibration.cache"), NoProgress()).package
    assert (first / "int8.onnx").read_bytes() == (again / "int8.onnx").read_bytes()
    assert (first / "calibration.cache").read_bytes() == (again / "calibration.cache").read_bytes()


def test_a_cache_of_another_model_is_refused_and_both_are_named(
    request_: BuildRequest, tmp_path: Path
) -> None:
    built = build(request_, NoProgress())
    cache, manifest = built.package / "calibration.cache", built.manifest
    other = change(request_, model=save(mlp(width=12), tmp_path / "other.onnx"), calibration_cache=cache)
    hashes = f"model with sha256 {manifest.source_sha256}.* this build has [0-9a-f]{{64}}"
    with pytest.raises(BuildError, match=hashes):
        build(other, NoProgress())
    with pytest.raises(BuildError, match="the method best, and this build has minmax"):
        build(change(request_, calibration_cache=cache, calibration_method="minmax"), NoProgress())


def test_models_with_a_fixed_batch_or_none_are_built_too(tmp_path: Path) -> None:
    """The whole way, INT8 included, for the kinds whose samples are fed differently."""
    node = helper.make_node
    w, c = weights(6, 4), weights(3, 4)
    models = {
        "fixed": make_model(
            [node("MatMul", ["x", "w"], ["m"]), node("Expand", ["m", "shape"], ["y"])],
            {"x": (TensorProto.FLOAT, [3, 6])},
            {"y": (TensorProto.FLOAT, [3, 4])},
            {"w": w, "shape": np.array([3, 4], np.int64)},
        ),
        "placed": make_model(
            [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "c"], ["y"])],
            {"x": (TensorProto.FLOAT, [3, 6])},
            {"y": (TensorProto.FLOAT, [3, 4])},
            {"w": w, "c": c},
        ),
        "alone": make_model(
            [node("MatMul", ["x", "w"], ["m"]), node("ReduceMax", ["m"], ["y"], axes=[0], keepdims=0)],
            {"x": (TensorProto.FLOAT, ["n", 6])},
            {"y": (TensorProto.FLOAT, [4])},
            {"w": w},
        ),
    }
    kinds = {"fixed": "fixed", "placed": "none", "alone": "none"}
    for name, model in models.items():
        source = tmp_path / f"{name}.npz"
        np.savez(source, x=weights(*((50, 5, 6) if name == "alone" else (50, 6)), seed=2))
        outcome = build(
            BuildRequest(
                model=save(model, tmp_path / f"{name}.onnx"),
                name=name,
                out=tmp_path / "engines",
                precisions=("fp32", "fp16", "int8"),
                calibration=str(source),
                evaluation=str(source),
            ),
            NoProgress(),
        )
        assert outcome.manifest.batching.kind == kinds[name]
        golden = load_golden(outcome.package / "golden.npz")
        assert name != "fixed" or golden.samples % 3 == 0
        assert name != "placed" or golden.inputs["x"].shape[1:] == (3, 6)
        assert {v.precision: v.status for v in outcome.variants}["int8"] == "pass"
        assert all(v.latency_ms for v in outcome.variants)


def test_a_convolutional_model_of_the_old_days_reaches_int8(tmp_path: Path) -> None:
    source = tmp_path / "d.npz"
    np.savez(source, x=weights(64, 3, 16, 16, seed=2))
    outcome = build(
        BuildRequest(
            model=save(old_cnn(), tmp_path / "old.onnx"),
            name="old",
            out=tmp_path / "engines",
            precisions=("fp32", "int8"),
            calibration=str(source),
            max_batch=4,
        ),
        NoProgress(),
    )
    assignment = outcome.manifest.variants["int8"].assignment
    assert assignment["int8"] >= 1
    assert sum(assignment.values()) == 2
    assert json.loads((outcome.package / "manifest.json").read_text())["batching"]["dim"] == "batch"
    assert isinstance(outcome.manifest, Manifest)


def test_plans_are_built_beside_the_variants_without_a_gpu(request_: BuildRequest) -> None:
    outcome = build(
        change(request_, plans=PlanOptions("tensorrt-rtx", compute_capabilities=("8.9",))), NoProgress()
    )
    assert {p.precision for p in outcome.manifest.plans} == {"fp32", "fp16", "int8"}
    for plan in outcome.manifest.plans:
        assert (outcome.package / plan.path).stat().st_size == plan.bytes
        variant = outcome.manifest.variants[plan.precision].files[0]
        assert plan.variant_sha256 == outcome.manifest.files[variant].sha256
    with pytest.raises(BuildError, match="tensorrt is not usable here"):
        build(change(request_, plans=PlanOptions("tensorrt")), NoProgress())


def test_precisions_that_only_gpus_have_are_kept_for_them(request_: BuildRequest) -> None:
    outcome = build(change(request_, precisions=("fp32", "tf32", "bf16")), NoProgress())
    assert outcome.exit_code == 0
    variants = outcome.manifest.variants
    assert set(variants) == {"fp32", "tf32", "bf16"}
    assert variants["tf32"].files == ["fp32.onnx"]
    assert variants["tf32"].gates["emulated"].passed
    assert not variants["tf32"].gates["onnxruntime"].passed
    assert outcome.manifest.decision["onnxruntime"] == "fp32"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "é", "x" * 200])
def test_names_that_cannot_be_a_folder_are_refused(request_: BuildRequest, name: str) -> None:
    with pytest.raises(BuildError, match="cannot be a model's name"):
        build(change(request_, name=name), NoProgress())


def test_precision_lists_are_read_and_unknown_ones_named() -> None:
    assert parse_precisions("int8, FP16,int8") == ("fp32", "int8", "fp16")
    assert parse_precisions("auto") == ("auto",)
    for text, message in (
        ("fp64", "'fp64' is no precision"),
        ("", "empty"),
        ("auto,int8", "either auto or a list"),
    ):
        with pytest.raises(BuildError, match=message):
            parse_precisions(text)


def test_sequence_options_are_read_and_malformed_ones_named() -> None:
    assert parse_sequence([]) is None
    assert parse_sequence(["none"]) == {}
    assert parse_sequence(["frames", "t=16,32"]) == {"frames": [], "t": [16, 32]}
    for text in ("=3", "t=0", "t=a"):
        with pytest.raises(BuildError, match="--sequence"):
            parse_sequence([text])
    assert parse_pad_values(["ids=1", "x=-0.5"]) == {"ids": 1.0, "x": -0.5}
    for text in ("ids", "=1", "ids=one", "ids=nan"):
        with pytest.raises(BuildError, match="--pad-value"):
            parse_pad_values([text])
