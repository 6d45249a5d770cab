from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.support.packages import mlp_model
from vernier.engine.ort import OnnxRuntimeExecutor
from vernier.engine.validated import ValidatedEngine, choose


@pytest.fixture
def executor(tmp_path: Path) -> OnnxRuntimeExecutor:
    onnx.save(mlp_model(), tmp_path / "m.onnx")
    return OnnxRuntimeExecutor(tmp_path / "m.onnx", precision="fp32", intra_op_threads=1)


def engines(executor: OnnxRuntimeExecutor, **times: float) -> dict[str, ValidatedEngine]:
    return {
        name.replace("_", "-"): ValidatedEngine(executor, {1: 1e-3, 64: seconds})
        for name, seconds in times.items()
    }


def test_nothing_ready_is_nothing_chosen() -> None:
    assert choose({}, "auto") is None
    assert choose({}, "int8") is None


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("fp16", "fp16"),
        ("int8", "int8"),
        ("fp32", "fp32"),
        ("fp8", "int8"),
        ("int8-fp32", "fp16"),
        ("tf32", "fp32"),
    ],
)
def test_a_named_precision_or_the_nearest_safer_one_serves(
    executor: OnnxRuntimeExecutor, wanted: str, expected: str
) -> None:
    assert choose(engines(executor, fp32=4.0, fp16=2.0, int8=1.0), wanted) == expected


def test_when_nothing_safer_is_ready_the_safest_serves(executor: OnnxRuntimeExecutor) -> None:
    assert choose(engines(executor, int8=1.0, fp16=1.0), "fp32") == "fp16"


def test_auto_takes_the_fastest_at_the_largest_bucket(executor: OnnxRuntimeExecutor) -> None:
    assert choose(engines(executor, fp32=4.0, fp16=2.0, int8=1.0), "auto") == "int8"
    assert choose(engines(executor, fp32=4.0, fp16=1.0, int8=2.0), "auto") == "fp16"


def test_auto_takes_the_safer_of_two_equals(executor: OnnxRuntimeExecutor) -> None:
    assert choose(engines(executor, fp32=1.0, fp16=1.0), "auto") == "fp32"


def test_auto_compares_only_buckets_that_all_were_measured_at(executor: OnnxRuntimeExecutor) -> None:
    ready = {
        "fp32": ValidatedEngine(executor, {1: 1e-3, 8: 2e-3}),
        "int8": ValidatedEngine(executor, {1: 2e-3, 8: 1e-3, 64: 9.0}),
    }
    assert choose(ready, "auto") == "int8"


def test_auto_without_any_measurement_takes_the_safest(executor: OnnxRuntimeExecutor) -> None:
    ready = {"int8": ValidatedEngine(executor, {}), "fp16": ValidatedEngine(executor, {1: 1.0})}
    assert choose(ready, "auto") == "fp16"
