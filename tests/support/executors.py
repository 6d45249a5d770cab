"""Executors of every runtime over the same small packages, for the contract suite and the GPU tests.

Keeps to Python 3.9 and needs no onnx where VERNIER_TEST_PACKAGES names packages made beforehand
(`python -m benchmarks.gpu.packages --small OUT`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np
import onnxruntime

from vernier.builder.plans.plan import PlanOptions, build_plan
from vernier.engine.base import Executor
from vernier.engine.cuda import open_device
from vernier.engine.ort import OnnxRuntimeExecutor
from vernier.engine.trt_runtime.trt import TensorRtExecutor
from vernier.engine.trt_runtime.trt_api import load_api
from vernier.package.golden import GoldenVectors, load_golden
from vernier.package.integrity import open_package
from vernier.package.manifest import Manifest
from vernier.package.plans import Target, variant_files
from vernier.tensors import Arrays

PREPARED = "VERNIER_TEST_PACKAGES"
#: How many slots a test may open of one plan; below TensorRT 10 a plan must foresee them.
PROFILES = 8


def make_packages(folder: Path) -> Path:
    """The folder that PREPARED names, else packages written into `folder`."""
    prepared = os.environ.get(PREPARED)
    if prepared:
        return Path(prepared)
    from benchmarks.gpu.packages import write_all

    write_all(folder, large=False)
    return folder


class Shop:
    """Opens executors; a plan is built once for all tests."""

    def __init__(self, packages: Path, runtime: str) -> None:
        self.packages = packages
        self.runtime = runtime
        self._plans: Dict[Tuple[str, str, int], bytes] = {}
        self._manifests: Dict[str, Manifest] = {}

    def package(self, name: str) -> Path:
        return self.packages / name / "1"

    def manifest(self, name: str) -> Manifest:
        if name not in self._manifests:
            self._manifests[name] = open_package(self.package(name))
        return self._manifests[name]

    def golden(self, name: str) -> GoldenVectors:
        return load_golden(self.package(name) / "golden.npz")

    def reference(self, name: str) -> Reference:
        return Reference(self.package(name) / "fp32.onnx")

    def target(self) -> Target:
        api, device = load_api(self.runtime), open_device()
        return Target(api.runtime, api.version, device.compute_capability, device.name)

    def plan(self, name: str, precision: str, profiles: int = PROFILES) -> bytes:
        key = (name, precision, profiles)
        if key not in self._plans:
            manifest = self.manifest(name)
            model = variant_files(manifest.variants[precision], self.target())[0]
            options = PlanOptions(self.runtime, precision, manifest.dims, profiles)
            self._plans[key] = build_plan(self.package(name) / model, manifest.input_specs(), options).data
        return self._plans[key]

    def open(
        self, name: str, precision: str = "fp32", plan: Optional[bytes] = None, **changes: Any
    ) -> Executor:
        manifest = self.manifest(name)
        if self.runtime == "onnxruntime":
            path = self.package(name) / manifest.variants[precision].files[0]
            return OnnxRuntimeExecutor(path, precision=precision, intra_op_threads=1)
        return TensorRtExecutor(
            plan if plan is not None else self.plan(name, precision),
            api=load_api(self.runtime),
            device=open_device(),
            precision=precision,
            inputs=manifest.input_specs(),
            outputs=manifest.output_specs(),
            **changes,
        )


class Reference:
    """ONNX Runtime itself on the FP32 graph, nothing of ours."""

    def __init__(self, model: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._names, self._session.run(self._names, inputs)))


def random_inputs(name: str, rows: int, seed: int) -> Arrays:
    """Fresh inputs of a package of `benchmarks.gpu.packages`."""
    rng = np.random.default_rng(seed)
    if name == "typed":
        dense = rng.normal(size=(rows, 8)).astype(np.float32)
        return {"dense": dense, "ids": rng.integers(0, 50, (rows, 4), dtype=np.int64)}
    width = 64 if name == "mlp" else 8
    return {"x": rng.normal(size=(rows, width)).astype(np.float32)}


def assert_same(found: Arrays, expected: Arrays, tolerance: float = 1e-4) -> None:
    """Floats within `tolerance` of the largest magnitude, everything else equal; types and shapes too."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        got = found[name]
        assert got.dtype == wanted.dtype, name
        assert got.shape == wanted.shape, name
        if wanted.dtype.kind == "f":
            assert np.isfinite(got).all(), name
            limit = tolerance * max(float(np.abs(wanted).max(initial=0)), 1e-6)
            assert float(np.abs(got - wanted).max(initial=0)) <= limit, name
        else:
            assert np.array_equal(got, wanted), name
