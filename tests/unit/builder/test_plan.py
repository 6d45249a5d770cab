"""Real plans, built by TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.support.graphs import CHANNELS, residual_model, with_unknown_operator
from vernier.builder.plans.plan import PlanOptions, build_plan
from vernier.builder.plans.plan_package import add_plans, parse_capabilities
from vernier.errors import BuildError
from vernier.package.integrity import entries_of, sha256_file
from vernier.package.manifest import DimRange, Manifest
from vernier.package.plans import Target, fit
from vernier.tensors import TensorSpec

DIMS = {"batch": DimRange(min=1, opt=8, max=32), "height": DimRange(min=4, opt=16, max=40)}
INPUTS = [TensorSpec("x", "float32", ("batch", CHANNELS, "height", 12))]


def options(precision: str = "fp32", **changes: object) -> PlanOptions:
    fields: dict[str, object] = {"dims": DIMS, "compute_capabilities": ("8.9",)}
    return PlanOptions("tensorrt-rtx", precision, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_each_precision_becomes_a_plan_without_a_gpu(precision: str) -> None:
    seen: list[float] = []
    model = residual_model(precision).SerializeToString()
    built = build_plan(model, INPUTS, options(precision), lambda phase, share: seen.append(share))
    assert len(built.data) > 1000
    assert built.runtime_version.startswith("1.")
    assert seen[-1] == 1.0
    assert all(0 <= share <= 1 for share in seen)


def test_int8_weights_stay_int8_in_the_plan() -> None:
    inputs = [TensorSpec("x", "float32", ("batch", 256, "height", 12))]
    sizes = {
        p: len(build_plan(residual_model(p, channels=256).SerializeToString(), inputs, options(p)).data)
        for p in ("fp32", "fp16", "int8")
    }
    assert sizes["int8"] < 0.65 * sizes["fp16"] < 0.65 * 0.65 * sizes["fp32"]


def test_one_plan_can_be_made_for_several_architectures() -> None:
    model = residual_model("fp16").SerializeToString()
    one = build_plan(model, INPUTS, options("fp16"))
    two = build_plan(model, INPUTS, options("fp16", compute_capabilities=("8.9", "12.0")))
    assert len(two.data) > len(one.data)


def test_the_builders_options_are_taken(tmp_path: Path) -> None:
    wanted = options(
        workspace_bytes=64 << 20,
        optimization_level=1,
        sparsity=True,
        version_compatible=True,
        timing_cache=tmp_path / "never.timing",
    )
    assert build_plan(residual_model("fp32").SerializeToString(), INPUTS, wanted).data
    # Nothing is timed where there is no GPU, so there is nothing to keep.
    assert not (tmp_path / "never.timing").exists()


def test_an_unknown_operator_is_named_with_its_node() -> None:
    model = with_unknown_operator(residual_model("fp32")).SerializeToString()
    with pytest.raises(
        BuildError, match=r"node 'relu' \(Frobnicate\): tensorrt-rtx has no operator 'Frobnicate'"
    ):
        build_plan(model, INPUTS, options())


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x08\x09"])
def test_what_is_no_graph_is_refused_in_a_sentence(damage: bytes) -> None:
    with pytest.raises(BuildError, match="cannot read the graph"):
        build_plan(damage, INPUTS, options())


def test_a_truncated_graph_is_refused_in_a_sentence() -> None:
    with pytest.raises(BuildError, match="cannot read the graph"):
        build_plan(residual_model("fp32").SerializeToString()[:-200], INPUTS, options())


def test_a_dimension_without_a_range_is_named() -> None:
    with pytest.raises(BuildError, match="input 'x' needs a range for dimension 'height'"):
        build_plan(residual_model("fp32").SerializeToString(), INPUTS, options(dims={"batch": DIMS["batch"]}))


def test_an_input_that_the_manifest_does_not_name_is_refused() -> None:
    with pytest.raises(BuildError, match="has an input 'x' that the manifest does not name"):
        build_plan(residual_model("fp32").SerializeToString(), [], options())


def test_an_architecture_that_rtx_does_not_know_is_refused_with_those_it_knows() -> None:
    with pytest.raises(BuildError, match=r"cannot build for GPU architecture 9\.0; it knows 75, 80"):
        build_plan(residual_model("fp32").SerializeToString(), INPUTS, options(compute_capabilities=("9.0",)))


def test_the_lean_runtime_says_that_it_only_runs() -> None:
    with pytest.raises(BuildError, match="tensorrt-lean only runs plans"):
        build_plan(b"", INPUTS, PlanOptions("tensorrt-lean", "fp32"))


@pytest.mark.parametrize(
    ("text", "expected"), [("89,120", ("8.9", "12.0")), ("8.9", ("8.9",)), (" 75 , 8.6 ", ("7.5", "8.6"))]
)
def test_architectures_are_written_either_way(text: str, expected: tuple[str, ...]) -> None:
    assert parse_capabilities(text) == expected


@pytest.mark.parametrize("text", ["", "ada", "89;120", "8", "1234"])
def test_what_is_no_architecture_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="--sm takes GPU architectures such as 89,120"):
        parse_capabilities(text)


# --- a package's plans -----------------------------------------------------------------------------
def package(folder: Path) -> Manifest:
    for precision in ("fp32", "fp16", "int8"):
        onnx.save(residual_model(precision), folder / f"{precision}.onnx")
    return Manifest.model_validate(
        {
            "name": "residual",
            "version": 1,
            "created": "2026-01-01T00:00:00Z",
            "source_sha256": "0" * 64,
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", CHANNELS, "height", 12]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", CHANNELS]}],
            "dims": {name: r.model_dump() for name, r in DIMS.items()},
            "batching": {"kind": "dynamic", "dim": "batch"},
            "variants": {p: {"precision": p, "files": [f"{p}.onnx"]} for p in ("fp32", "fp16", "int8")},
            "files": {p: e.model_dump() for p, e in entries_of(folder).items()},
        }
    )


def test_a_package_gets_a_plan_for_each_variant_and_their_entries_fit(tmp_path: Path) -> None:
    manifest = package(tmp_path)
    entries, notes = add_plans(tmp_path, manifest, options(compute_capabilities=("8.9", "12.0")))
    assert [e.precision for e in entries] == ["fp32", "fp16", "int8"]
    assert notes == []
    for entry in entries:
        assert sha256_file(tmp_path / entry.path) == entry.sha256
        target = Target("tensorrt-rtx", entry.runtime_version, "12.0", "RTX 5090")
        assert fit(entry, target, manifest.files[f"{entry.precision}.onnx"].sha256) is None


def test_without_a_gpu_rtx_asks_for_which_gpus_to_build(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="say for which GPUs to build, such as --sm 89,120"):
        add_plans(tmp_path, package(tmp_path), options(compute_capabilities=()))


# --- the process of its own ------------------------------------------------------------------------
def run_builder(tmp_path: Path, model: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    wanted = {
        "runtime": "tensorrt-rtx",
        "precision": "fp32",
        "dims": {name: r.model_dump() for name, r in DIMS.items()},
        "profiles": 2,
        "compute_capabilities": ["8.9"],
        "timing_cache": str(tmp_path / "t.timing"),
    }
    request = {
        "model": str(model),
        "inputs": [["x", "float32", ["batch", CHANNELS, "height", 12]]],
        "options": {**wanted, **changes},
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [
        sys.executable,
        "-m",
        "vernier.builder.plans.plan",
        str(tmp_path / "request.json"),
        str(tmp_path / "out.plan"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_builder_process_writes_the_plan(tmp_path: Path) -> None:
    onnx.save(residual_model("fp32"), tmp_path / "m.onnx")
    done = run_builder(tmp_path, tmp_path / "m.onnx")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.plan").stat().st_size > 1000


def test_a_builder_process_that_fails_ends_with_2_and_a_sentence(tmp_path: Path) -> None:
    onnx.save(with_unknown_operator(residual_model("fp32")), tmp_path / "m.onnx")
    done = run_builder(tmp_path, tmp_path / "m.onnx")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("tensorrt-rtx")
    assert not (tmp_path / "out.plan").exists()
