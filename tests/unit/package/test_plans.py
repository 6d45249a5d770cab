from __future__ import annotations

from typing import Any

import pytest

from vernier.errors import PlanMismatch
from vernier.package.manifest import PlanEntry, VariantEntry
from vernier.package.plans import Target, fit, plan_folder, unsupported, variant_files, version_parts

H200 = Target("tensorrt", "10.9.0.34", "9.0", "NVIDIA H200")
L4 = Target("tensorrt-rtx", "1.7.1.116", "8.9", "NVIDIA L4")
LEAN = Target("tensorrt-lean", "11.4.0.106", "9.0", "NVIDIA H200")
VARIANT = "a" * 64


def entry(**changes: Any) -> PlanEntry:
    fields: dict[str, Any] = {
        "path": "plans/p/fp16.plan",
        "sha256": "b" * 64,
        "bytes": 10,
        "precision": "fp16",
        "runtime": "tensorrt",
        "runtime_version": "10.9.0.34",
        "compute_capability": "9.0",
        "variant_sha256": VARIANT,
    }
    return PlanEntry.model_validate({**fields, **changes})


def test_a_plan_for_this_gpu_runtime_and_variant_fits() -> None:
    assert fit(entry(), H200, VARIANT) is None


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        (
            {"compute_capability": "8.9"},
            H200,
            "was built for GPU architecture 8.9, but this GPU (NVIDIA H200) is 9.0",
        ),
        ({"runtime_version": "10.8.0.1"}, H200, "was built by tensorrt 10.8.0.1, but this is 10.9.0.34"),
        ({}, L4, "was built for tensorrt, but this is tensorrt-rtx"),
        ({"variant_sha256": "c" * 64}, H200, "was built from another fp16 variant"),
        ({}, LEAN, "is not version-compatible, which is all that tensorrt-lean runs"),
        ({"version_compatible": True}, LEAN, "within major version 10, but this is 11.4.0.106"),
        (
            {"version_compatible": True, "runtime_version": "11.5.0.1"},
            LEAN,
            "from TensorRT 11.5.0.1 on",
        ),
        (
            {"hardware_compatible": True, "compute_capability": ""},
            Target("tensorrt", "10.9.0.34", "7.5", "Tesla T4"),
            "hardware-compatible from GPU architecture 8.0 on, but this GPU (Tesla T4) is 7.5",
        ),
    ],
)
def test_a_plan_that_does_not_fit_says_which_and_why_in_one_sentence(
    changes: dict[str, Any], target: Target, words: str
) -> None:
    reason = fit(entry(**changes), target, VARIANT)
    assert reason is not None
    assert words in reason
    assert reason.startswith("plan 'plans/p/fp16.plan' ")
    assert "\n" not in reason


def test_a_version_compatible_plan_runs_on_a_newer_lean_runtime_of_its_major_version() -> None:
    plan = entry(version_compatible=True, runtime_version="11.2.0.1")
    assert fit(plan, LEAN, VARIANT) is None


def test_a_plan_for_several_architectures_fits_each_of_them_and_no_other() -> None:
    plan = entry(runtime="tensorrt-rtx", runtime_version="1.7.1.116", compute_capability="8.9,12.0")
    assert fit(plan, L4, VARIANT) is None
    assert fit(plan, Target("tensorrt-rtx", "1.7.1.116", "8.6", "RTX 3090"), VARIANT) is not None
    assert fit(plan, Target("tensorrt-rtx", "1.7.1.116", "2.0", "none"), VARIANT) is not None


@pytest.mark.parametrize(
    ("precision", "target", "possible"),
    [
        ("fp8", Target("tensorrt", "10.9.0.34", "8.6", "A10"), False),
        ("fp8", H200, True),
        ("fp8", Target("tensorrt", "8.5.1.7", "9.0", "NVIDIA H200"), False),
        ("bf16", Target("tensorrt", "8.5.1.7", "9.0", "NVIDIA H200"), False),
        ("bf16", Target("tensorrt", "10.9.0.34", "7.5", "Tesla T4"), False),
        ("tf32", Target("tensorrt", "10.9.0.34", "7.5", "Tesla T4"), False),
        ("int8", Target("tensorrt", "10.9.0.34", "7.5", "Tesla T4"), True),
        ("fp16", Target("tensorrt-rtx", "1.7.1.116", "9.0", "NVIDIA H200"), False),
    ],
)
def test_what_the_hardware_or_runtime_cannot_run_is_known_beforehand(
    precision: str, target: Target, possible: bool
) -> None:
    assert (unsupported(precision, target) is None) is possible


def test_tensorrt_below_10_builds_from_its_own_lowering() -> None:
    old = Target("tensorrt", "8.5.1.7", "9.0", "NVIDIA H200")
    both = VariantEntry(precision="int8", files=["int8.onnx"], lowerings={"tensorrt<10": ["int8.trt8.onnx"]})
    assert variant_files(both, old) == ["int8.trt8.onnx"]
    assert variant_files(both, H200) == ["int8.onnx"]
    assert variant_files(VariantEntry(precision="fp32", files=["fp32.onnx"]), old) == ["fp32.onnx"]
    with pytest.raises(PlanMismatch, match=r"no int8 graph for TensorRT 8\.5\.1\.7"):
        variant_files(VariantEntry(precision="int8", files=["int8.onnx"]), old)


def test_the_folder_of_a_plan_names_runtime_version_and_architecture() -> None:
    assert plan_folder("tensorrt-rtx", "1.7.1.116", "8.9,12.0") == "plans/tensorrt-rtx-1.7.1.116-sm89+120"
    assert plan_folder("tensorrt", "10.9.0.34", "") == "plans/tensorrt-10.9.0.34-smany"


def test_a_version_is_read_up_to_its_first_word() -> None:
    assert version_parts("10.9.0rc1") == (10, 9)
    assert version_parts("unknown") == (0,)
