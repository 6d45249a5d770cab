"""What `vernier.engine.base` promises, held by every executor: ONNX Runtime here, TensorRT where there is a GPU."""

from __future__ import annotations

import sys
import threading
from time import monotonic, perf_counter
from typing import Iterator, List

import numpy as np
import pytest

from tests.support.executors import Shop, assert_same, random_inputs
from vernier.engine.base import Executor, Slot, run_once
from vernier.errors import EngineError, SlotConflict

SIZES = (1, 7, 64, 3, 64, 1, 16, 33, 2)


@pytest.fixture
def mlp(shop: Shop) -> Iterator[Executor]:
    executor = shop.open("mlp")
    yield executor
    executor.close()


@pytest.fixture
def slot(mlp: Executor) -> Iterator[Slot]:
    slot = mlp.open_slot()
    yield slot
    slot.close()


@pytest.mark.parametrize("name", ["mlp", "typed"])
def test_golden_inputs_give_golden_outputs(shop: Shop, name: str) -> None:
    golden = shop.golden(name)
    executor = shop.open(name)
    slot = executor.open_slot()
    try:
        assert_same(run_once(slot, golden.inputs), golden.outputs)
    finally:
        slot.close()
        executor.close()


def test_specs_are_the_manifests(shop: Shop, mlp: Executor) -> None:
    manifest = shop.manifest("mlp")
    assert list(mlp.inputs) == manifest.input_specs()
    assert list(mlp.outputs) == manifest.output_specs()
    assert mlp.precision == "fp32"
    assert mlp.runtime == shop.runtime
    assert mlp.engine_bytes > 0
    assert mlp.load_seconds > 0


@pytest.mark.parametrize("name", ["mlp", "typed"])
def test_batches_of_every_size_interleave_and_each_gets_its_answer(shop: Shop, name: str) -> None:
    reference = shop.reference(name)
    executor = shop.open(name)
    slot = executor.open_slot()
    try:
        for round_number in range(4):
            for position, rows in enumerate(SIZES):
                inputs = random_inputs(name, rows, 100 * round_number + position)
                assert_same(run_once(slot, inputs), reference(inputs))
    finally:
        slot.close()
        executor.close()


def test_staged_arrays_have_the_asked_shape_and_type_and_can_be_written(shop: Shop) -> None:
    executor = shop.open("typed")
    slot = executor.open_slot()
    try:
        views = slot.stage({"dense": (5, 8), "ids": (5, 4)})
        assert views["dense"].shape == (5, 8)
        assert views["dense"].dtype == np.float32
        assert views["ids"].shape == (5, 4)
        assert views["ids"].dtype == np.int64
        assert all(view.flags.writeable for view in views.values())
    finally:
        slot.close()
        executor.close()


def test_results_stay_as_they_are_until_the_next_stage(slot: Slot, shop: Shop) -> None:
    for rows in (4, 4, 4, 4):
        inputs = random_inputs("mlp", rows, rows)
        views = slot.stage({"x": (rows, 64)})
        views["x"][...] = inputs["x"]
        first = slot.run()["score"]
        kept = first.copy()
        views["x"][...] = 0
        assert np.array_equal(first, kept)


def test_a_run_repeated_without_a_new_stage_gives_the_same_answer(slot: Slot, shop: Shop) -> None:
    inputs = random_inputs("mlp", 8, 1)
    slot.stage({"x": (8, 64)})["x"][...] = inputs["x"]
    expected = shop.reference("mlp")(inputs)
    for _ in range(5):
        assert_same(slot.run(), expected)


@pytest.mark.parametrize("shapes", [{"x": (64,)}, {"x": (4, 63)}, {"y": (4, 64)}, {}])
def test_shapes_that_the_model_does_not_take_are_an_engine_error(slot: Slot, shapes: dict) -> None:
    with pytest.raises(EngineError):
        slot.stage(shapes)


def test_a_refused_shape_leaves_the_slot_usable(slot: Slot, shop: Shop) -> None:
    with pytest.raises(EngineError):
        slot.stage({"x": (4, 63)})
    inputs = random_inputs("mlp", 4, 2)
    assert_same(run_once(slot, inputs), shop.reference("mlp")(inputs))


def test_running_before_staging_is_an_engine_error(slot: Slot) -> None:
    with pytest.raises(EngineError):
        slot.run()


def test_inputs_that_are_read_in_place_are_read_once_and_let_go(slot: Slot, shop: Shop) -> None:
    if not slot.reads_in_place:
        with pytest.raises(EngineError, match="stage"):
            slot.read_in_place(random_inputs("mlp", 4, 1))
        return
    for rows in (4, 64, 4):
        inputs = random_inputs("mlp", rows, rows)
        (x,) = inputs.values()
        x.flags.writeable = False  # as a received body is
        before = sys.getrefcount(x)
        slot.read_in_place(inputs)
        results = slot.run()
        del inputs
        assert sys.getrefcount(x) == before - 1
        assert_same(results, shop.reference("mlp")({"x": x}))
        assert not any(np.shares_memory(x, array) for array in results.values())
        with pytest.raises(EngineError):
            slot.run()
        assert_same(run_once(slot, {"x": x}), shop.reference("mlp")({"x": x}))


def test_inputs_in_place_that_the_model_does_not_take_are_an_engine_error_and_let_go(slot: Slot) -> None:
    if not slot.reads_in_place:
        pytest.skip("this slot reads what is staged")
    wrong = np.zeros((4, 63), np.float32)
    before = sys.getrefcount(wrong)
    slot.read_in_place({"x": wrong})
    with pytest.raises(EngineError):
        slot.run()
    assert sys.getrefcount(wrong) == before


def test_stage_times_are_those_of_the_last_run(slot: Slot) -> None:
    for _ in range(4):
        slot.stage({"x": (64, 64)})["x"][...] = 1
        started = perf_counter()
        slot.run()
        wall = perf_counter() - started
        times = slot.last_times
        assert min(times.input, times.infer, times.output) >= 0
        assert times.infer > 0
        assert times.input + times.infer + times.output <= wall * 1.01


def test_two_threads_on_one_slot_are_a_slot_conflict(slot: Slot) -> None:
    slot.stage({"x": (64, 64)})["x"][...] = 1
    conflicts: List[SlotConflict] = []
    end = monotonic() + 20

    def hammer() -> None:
        while not conflicts and monotonic() < end:
            try:
                slot.run()
            except SlotConflict as conflict:
                conflicts.append(conflict)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert conflicts
    slot.run()


def test_eight_threads_with_a_slot_each_get_their_own_answers(shop: Shop, mlp: Executor) -> None:
    reference = shop.reference("mlp")
    rounds = 1000 if shop.runtime != "onnxruntime" else 100
    failures: List[BaseException] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        slot = mlp.open_slot()
        try:
            for round_number in range(rounds):
                inputs = random_inputs("mlp", int(rng.integers(1, 65)), 10_000 * number + round_number)
                assert_same(run_once(slot, inputs), reference(inputs))
        except BaseException as error:
            failures.append(error)
        finally:
            slot.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_closing_twice_is_closing_once(shop: Shop) -> None:
    executor = shop.open("mlp")
    slot = executor.open_slot()
    slot.close()
    slot.close()
    executor.close()
    executor.close()
    with pytest.raises(EngineError):
        executor.open_slot()
