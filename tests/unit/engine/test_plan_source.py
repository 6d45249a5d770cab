"""Finding plans and building them in a process of its own; TensorRT-RTX builds here without a GPU."""

from __future__ import annotations

import threading
from pathlib import Path

import onnx
import pytest

from tests.support.graphs import CHANNELS, residual_model, with_unknown_operator
from vernier.engine.plans.plan_source import (
    BuilderProcess,
    Cancellation,
    PlanSource,
    RebuildRequest,
    visible_device,
)
from vernier.engine.trt_runtime.trt_api import load_api
from vernier.errors import EngineError, PackageError
from vernier.package.integrity import entries_of
from vernier.package.manifest import Manifest
from vernier.package.plan_cache import PlanCache
from vernier.package.plans import Target


@pytest.fixture
def target() -> Target:
    return Target("tensorrt-rtx", load_api("tensorrt-rtx").version, "8.9", "NVIDIA L4")


def write(folder: Path, model: onnx.ModelProto) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "fp32.onnx")
    return Manifest.model_validate(
        {
            "name": "residual",
            "version": 1,
            "created": "2026-01-01T00:00:00Z",
            "source_sha256": "0" * 64,
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", CHANNELS, "height", 12]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", CHANNELS]}],
            "dims": {"batch": {"min": 1, "opt": 8, "max": 32}, "height": {"min": 4, "opt": 16, "max": 40}},
            "batching": {"kind": "dynamic", "dim": "batch"},
            "variants": {"fp32": {"precision": "fp32", "files": ["fp32.onnx"]}},
            "files": {p: e.model_dump() for p, e in entries_of(folder).items()},
        }
    )


@pytest.fixture
def source(tmp_path: Path, target: Target) -> PlanSource:
    manifest = write(tmp_path / "residual" / "1", residual_model("fp32"))
    return PlanSource(tmp_path / "residual" / "1", manifest, target, PlanCache(tmp_path / "cache"))


def request(source: PlanSource, cancellation: Cancellation | None = None) -> RebuildRequest:
    return source.request("fp32", 2, 0, cancellation or Cancellation())


def test_a_rebuilt_plan_is_found_again_and_fits(source: PlanSource) -> None:
    entries, reasons = source.fitting("fp32")
    assert entries == []
    assert reasons == ["the package has no fp32 plan"]
    data = BuilderProcess()(request(source))
    entry = source.store("fp32", data)
    assert source.fitting("fp32") == ([entry], [])
    assert source.read(entry) == data
    assert source.entry("fp32", data) == entry


def test_a_plan_of_another_gpu_in_the_package_is_explained_and_not_offered(
    tmp_path: Path, target: Target
) -> None:
    folder = tmp_path / "residual" / "1"
    manifest = write(folder, residual_model("fp32"))
    plan = {
        "path": "plans/p/fp32.plan", "sha256": "1" * 64, "bytes": 3, "precision": "fp32",
        "runtime": "tensorrt-rtx", "runtime_version": target.runtime_version, "compute_capability": "12.0",
        "variant_sha256": manifest.files["fp32.onnx"].sha256,
    }  # fmt: skip
    manifest = Manifest.model_validate({**manifest.model_dump(), "plans": [plan]})
    entries, reasons = PlanSource(folder, manifest, target, PlanCache(tmp_path / "cache")).fitting("fp32")
    assert entries == []
    assert reasons == [
        "plan 'plans/p/fp32.plan' was built for GPU architecture 12.0, but this GPU (NVIDIA L4) is 8.9"
    ]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_plan_in_the_package_is_never_read(tmp_path: Path, target: Target, damage: str) -> None:
    folder = tmp_path / "residual" / "1"
    manifest = write(folder, residual_model("fp32"))
    path = folder / "fp32.plan"
    path.write_bytes(b"a serialized engine")
    entry = entries_of(folder)["fp32.plan"]
    plan = {
        "path": "fp32.plan", "sha256": entry.sha256, "bytes": entry.bytes, "precision": "fp32",
        "runtime": "tensorrt-rtx", "runtime_version": target.runtime_version, "compute_capability": "8.9",
        "variant_sha256": manifest.files["fp32.onnx"].sha256,
    }  # fmt: skip
    manifest = Manifest.model_validate({**manifest.model_dump(), "plans": [plan]})
    source = PlanSource(folder, manifest, target, PlanCache(tmp_path / "cache"))
    entries, _ = source.fitting("fp32")
    assert source.read(entries[0]) == b"a serialized engine"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"a serialized" if damage == "truncated" else b"A serialized engine")
    with pytest.raises(PackageError):
        source.read(entries[0])


def test_a_variant_that_changed_on_disk_is_not_built_from(source: PlanSource, tmp_path: Path) -> None:
    path = tmp_path / "residual" / "1" / "fp32.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(PackageError, match="was changed since it was loaded"):
        request(source)


def test_a_builder_that_fails_gives_its_last_sentence(tmp_path: Path, target: Target) -> None:
    folder = tmp_path / "residual" / "1"
    manifest = write(folder, with_unknown_operator(residual_model("fp32")))
    source = PlanSource(folder, manifest, target, PlanCache(tmp_path / "cache"))
    with pytest.raises(EngineError, match=r"ended with code 2: .*node 'relu' \(Frobnicate\)"):
        BuilderProcess()(request(source))


def test_a_builder_that_takes_too_long_is_ended(source: PlanSource) -> None:
    with pytest.raises(EngineError, match="took longer than 0 s"):
        BuilderProcess(timeout_s=0.01)(request(source))


def test_a_build_can_be_cancelled_before_it_starts_and_while_it_runs(source: PlanSource) -> None:
    early = Cancellation()
    early.cancel()
    with pytest.raises(EngineError, match="ended with code"):
        BuilderProcess()(request(source, early))
    late = Cancellation()
    timer = threading.Timer(0.2, late.cancel)
    timer.start()
    with pytest.raises(EngineError, match="ended with code"):
        BuilderProcess()(request(source, late))
    timer.join()


def test_cancelling_one_build_leaves_others_alone(source: PlanSource) -> None:
    builder = BuilderProcess()
    cancelled = Cancellation()
    cancelled.cancel()
    with pytest.raises(EngineError):
        builder(request(source, cancelled))
    assert builder(request(source))


@pytest.mark.parametrize(
    ("environment", "index", "expected"),
    [
        ({}, 1, "1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, "0"),
        ({"CUDA_VISIBLE_DEVICES": "3,GPU-abc"}, 1, "GPU-abc"),
    ],
)
def test_the_builder_sees_the_gpu_that_will_serve(
    environment: dict[str, str], index: int, expected: str
) -> None:
    assert visible_device(environment, index) == expected
