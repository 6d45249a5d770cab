"""The pool's parts on a real GPU: graphs, staging, outputs of unknown shape, memory."""

from __future__ import annotations

import gc
from typing import Any, Dict

import numpy as np
import pytest

from tests.support.executors import PROFILES, Shop, assert_same, random_inputs
from vernier.engine.base import run_once
from vernier.engine.cuda import Device
from vernier.engine.selftest import self_test
from vernier.engine.trt_runtime.trt_api import load_api
from vernier.errors import EngineError


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "int8"])
def test_every_precision_reproduces_the_golden_vectors_within_its_budget(shop: Shop, precision: str) -> None:
    executor = shop.open("mlp", precision)
    budget = shop.manifest("mlp").variants[precision].budget
    try:
        assert self_test(executor, shop.golden("mlp"), budget) is None
        # The test can fail: no plan is exact to the last bit of another runtime.
        assert self_test(executor, shop.golden("mlp"), {"rel_l2": 0.0}) is not None
    finally:
        executor.close()


def test_reduced_precision_is_really_used(shop: Shop) -> None:
    errors: Dict[str, float] = {}
    inputs = random_inputs("mlp", 64, 3)
    expected = shop.reference("mlp")(inputs)["score"]
    for precision in ("fp32", "tf32", "fp16", "int8"):
        executor = shop.open("mlp", precision)
        slot = executor.open_slot()
        found = run_once(slot, inputs)["score"]
        errors[precision] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        slot.close()
        executor.close()
    assert errors["fp32"] < 1e-5 < errors["tf32"] < errors["int8"]
    if not load_api("tensorrt").below_10:  # there, FP16 is only allowed, and taken where it is faster
        assert 1e-5 < errors["fp16"] < errors["int8"]


def test_nodes_pinned_to_fp32_do_not_overflow(shop: Shop) -> None:
    executor = shop.open("overflow", "fp16")
    try:
        assert self_test(executor, shop.golden("overflow"), {"rel_l2": 2e-2}) is None
    finally:
        executor.close()


@pytest.mark.parametrize(
    "changes", [{}, {"mapped_bytes": 0}, {"mapped_bytes": 1 << 20}, {"use_graphs": False}]
)
def test_graphs_and_mapped_memory_change_nothing_in_the_answers(shop: Shop, changes: Dict[str, Any]) -> None:
    reference = shop.reference("mlp")
    executor = shop.open("mlp", **changes)
    slot = executor.open_slot()
    try:
        for step in range(30):
            inputs = random_inputs("mlp", (1, 16, 64)[step % 3], step)
            assert_same(run_once(slot, inputs), reference(inputs))
        graphs, plain = executor.launches
        expected = (0, 30) if changes.get("use_graphs") is False else (24, 6)
        assert (graphs, plain) == expected
    finally:
        slot.close()
        executor.close()


def test_more_shapes_than_a_slot_remembers_still_answer_rightly(shop: Shop) -> None:
    reference = shop.reference("mlp")
    executor = shop.open("mlp")
    slot = executor.open_slot()
    try:
        for rows in [*range(1, 201), *range(1, 201)]:
            inputs = random_inputs("mlp", rows, rows)
            assert_same(run_once(slot, inputs), reference(inputs))
    finally:
        slot.close()
        executor.close()


def test_outputs_whose_shape_only_the_run_can_tell(shop: Shop) -> None:
    reference = shop.reference("nonzero")
    executor = shop.open("nonzero")
    if executor.api.below_10:
        # It would tell the shape of the run before: refused rather than answered wrongly.
        with pytest.raises(EngineError, match="only the run itself tells the shape of output 'where'"):
            executor.open_slot()
        executor.close()
        return
    slot = executor.open_slot()
    try:
        for step in range(12):
            inputs = random_inputs("nonzero", (1, 64, 5)[step % 3], step)
            if step == 5:
                inputs["x"][...] = -1
            assert_same(run_once(slot, inputs), reference(inputs))
        # Such a run cannot be captured: it is counted as plain.
        assert executor.launches == (0, 12)
    finally:
        slot.close()
        executor.close()


def test_int64_that_the_runtime_cannot_carry_is_refused_and_not_wrapped_around(shop: Shop) -> None:
    executor = shop.open("typed")
    slot = executor.open_slot()
    try:
        views = slot.stage({"dense": (1, 8), "ids": (1, 4)})
        views["dense"][...] = 0
        views["ids"][...] = 2**32 + 1
        if executor.api.plan_dtype("int64") == "int64":
            pytest.skip("this TensorRT has int64")
        with pytest.raises(EngineError, match="input 'ids' holds a value outside"):
            slot.run()
        views["ids"][...] = 1
        slot.run()
    finally:
        slot.close()
        executor.close()


def test_shapes_outside_the_plan_name_what_it_takes(shop: Shop) -> None:
    executor = shop.open("mlp")
    slot = executor.open_slot()
    try:
        with pytest.raises(EngineError, match=r"shape \[257, 64\] is outside .* \[1, 64\] to \[256, 64\]"):
            slot.stage({"x": (257, 64)})
        with pytest.raises(EngineError, match="outside"):
            slot.stage({"x": (0, 64)})
    finally:
        slot.close()
        executor.close()


def test_a_plan_says_when_it_has_no_slot_left(shop: Shop) -> None:
    executor = shop.open("mlp")
    slots = []
    try:
        if executor.max_slots is None:
            pytest.skip("this TensorRT shares one profile among all contexts")
        assert executor.max_slots == PROFILES
        slots = [executor.open_slot() for _ in range(PROFILES)]
        with pytest.raises(EngineError, match=f"has {PROFILES} optimization profile"):
            executor.open_slot()
        slots.pop().close()
        slots.append(executor.open_slot())
    finally:
        for slot in slots:
            slot.close()
        executor.close()


def test_an_executor_with_open_slots_refuses_to_close(shop: Shop) -> None:
    executor = shop.open("mlp")
    slot = executor.open_slot()
    with pytest.raises(EngineError, match="still open"):
        executor.close()
    slot.close()
    executor.close()


def _load_use_unload(shop: Shop) -> int:
    executor = shop.open("mlp", mapped_bytes=0)
    slots = [executor.open_slot() for _ in range(4)]
    for step in range(3):
        for slot in slots:
            run_once(slot, random_inputs("mlp", 64, step))
    used = executor.cuda.memory_used()
    for slot in slots:
        slot.close()
    executor.close()
    return used


def test_unloading_gives_the_memory_back(shop: Shop, device: Device) -> None:
    _load_use_unload(shop)  # what the driver and TensorRT keep for good is theirs after the first time
    gc.collect()
    before = device.memory_used()
    while_loaded = [_load_use_unload(shop) for _ in range(5)]
    gc.collect()
    after = device.memory_used()
    assert max(while_loaded) > before
    assert after <= before + (2 << 20)


def test_memory_that_is_not_there_is_an_engine_error_and_the_device_lives(shop: Shop, device: Device) -> None:
    with device, pytest.raises(EngineError, match="has no memory left"):
        device.allocate(device.memory_bytes * 2)
    assert device.failed is None
    executor = shop.open("mlp")
    slot = executor.open_slot()
    run_once(slot, random_inputs("mlp", 4, 0))
    slot.close()
    executor.close()
