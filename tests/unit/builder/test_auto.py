"""Candidates are what the hardware runs, and every sentence about a precision is true of its numbers."""

from __future__ import annotations

import pytest

from vernier.builder.searching.auto import Standing, explain, runs_on_gpu, worth_building

EXACT = Standing("fp32", "pass", {1: 2.0, 8: 8.0})


@pytest.mark.parametrize(
    ("capability", "tf32", "bf16", "int8", "fp8"),
    [
        ("7.5", False, False, True, False),
        ("8.0", True, True, True, False),
        ("8.6", True, True, True, False),
        ("8.9", True, True, True, True),
        ("9.0", True, True, True, True),
        ("12.0", True, True, True, True),
    ],
)
def test_each_gpu_generation_runs_what_its_tensor_cores_have(capability, tf32, bf16, int8, fp8) -> None:
    found = {p: runs_on_gpu(p, capability) for p in ("tf32", "bf16", "int8", "fp8")}
    assert found == {"tf32": tf32, "bf16": bf16, "int8": int8, "fp8": fp8}
    names, refused = worth_building("tensorrt", [capability])
    assert {p for p in found if found[p]} == set(names) & set(found)
    assert set(refused) == {p for p in found if not found[p]}


def test_a_package_for_several_gpus_holds_what_all_of_them_run() -> None:
    names, refused = worth_building("tensorrt-rtx", ["8.9", "7.5"])
    assert names == ["fp32", "fp16", "int8-fp32", "int8"]
    assert "7.5" in refused["fp8"]
    assert worth_building("tensorrt")[1] == {}


def test_a_cpu_is_offered_what_its_runtime_computes() -> None:
    names, refused = worth_building("onnxruntime")
    assert names == ["fp32", "fp16", "int8-fp32", "int8"]
    assert set(refused) == {"tf32", "bf16", "fp8"}


def test_every_precision_gets_its_reason() -> None:
    standings = [
        EXACT,
        Standing("bf16", "skipped", {}, "no kernels"),
        Standing("fp16", "pass", {1: 2.2, 8: 8.8}),
        Standing("int8-fp32", "pass", {1: 1.02, 8: 4.1}),
        Standing("int8", "pass", {1: 1.0, 8: 4.0}),
        Standing("fp8", "refused", {}, "auc is 0.5"),
        Standing("tf32", "pass", {}),
    ]
    found = explain("int8", standings, "onnxruntime")
    assert found["int8"] == (
        "chosen: the fastest inside its budget, 2.00 times as fast as fp32 on onnxruntime (batches of 1 to 8)"
    )
    assert found["fp32"] == "inside the budget, but it takes 2.00 times as long as int8"
    assert found["bf16"] == "not built: no kernels"
    assert found["fp16"] == "inside the budget, but it takes 2.20 times as long as int8"
    assert "as fast as int8 within 5%" in found["int8-fp32"]
    assert found["fp8"] == "refused: auc is 0.5"
    assert "not measured" in found["tf32"]


def test_between_equals_the_safer_is_served_and_the_other_is_told_so() -> None:
    found = explain("fp32", [EXACT, Standing("fp16", "pass", {1: 1.96, 8: 7.9})], "onnxruntime")
    assert found["fp32"] == "chosen: no variant inside the budget is faster"
    assert "safer of the two" in found["fp16"]
