"""How long a new slot is warmed, and what is known of the batches that did not run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from vernier.engine.base import Slot, StageTimes, default_buckets
from vernier.errors import EngineError
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.scheduling.warmup import probe, warm_up
from vernier.tensors import Arrays, TensorSpec

X = TensorSpec("x", "float32", ("batch", 2))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TimedSlot(Slot):
    """Takes `fixed_s` and `row_s` for each row on a virtual clock, twice that at its first run of a size."""

    def __init__(self, clock: Clock, fixed_s: float, row_s: float) -> None:
        self._clock = clock
        self._fixed_s, self._row_s = fixed_s, row_s
        self._staged = 0
        self.ran: list[int] = []

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        self._staged = shapes["x"][0]
        return {"x": np.zeros(shapes["x"], np.float32)}

    def run(self) -> Arrays:
        seconds = self._fixed_s + self._row_s * self._staged
        self._clock.now += seconds if self._staged in self.ran else 2 * seconds
        self.ran.append(self._staged)
        return {}

    @property
    def last_times(self) -> StageTimes:
        return StageTimes()

    def close(self) -> None:
        pass


class RefusingSlot(TimedSlot):
    def run(self) -> Arrays:
        raise EngineError("zeros are no valid input")


def layout_of(largest: int = 256) -> BatchLayout:
    return BatchLayout("dynamic", default_buckets(largest), [X], [X], "batch")


def test_a_quick_variant_is_measured_at_every_bucket() -> None:
    clock = Clock()
    slot = TimedSlot(clock, 1e-4, 1e-6)
    curve = warm_up({"fp32": slot}, layout_of(), clock=clock)["fp32"]
    assert set(curve) == set(slot.ran) == set(default_buckets(256))
    assert curve[256] == pytest.approx(1e-4 + 256e-6)


def test_a_slow_variant_does_not_keep_the_service_from_being_ready() -> None:
    clock = Clock()
    slots = {name: TimedSlot(clock, 0.0, 2e-3) for name in ("fp32", "int8")}
    warm_up(dict(slots), layout_of(), clock=clock)
    assert clock.now - 100.0 < 2 * 0.3
    for slot in slots.values():
        assert 1 in slot.ran
        assert 256 not in slot.ran


def test_a_variant_slower_than_the_whole_time_runs_once() -> None:
    clock = Clock()
    slot = TimedSlot(clock, 3.0, 1.0)
    curve = warm_up({"fp32": slot}, layout_of(), clock=clock)["fp32"]
    assert slot.ran == [1]
    assert curve == {1: pytest.approx(8.0)}


def test_what_did_not_run_has_the_shape_of_the_curve_measured_before_and_the_height_of_this_machine() -> None:
    clock = Clock()
    slot = TimedSlot(clock, 1e-3, 2e-3)  # three times as slow as where the model was built
    built = {b: (1e-3 + 2e-3 * b) / 3 for b in default_buckets(256)}
    curve = warm_up({"fp32": slot}, layout_of(), {"fp32": built}, clock=clock)["fp32"]
    assert 256 not in slot.ran
    assert curve == pytest.approx({b: 1e-3 + 2e-3 * b for b in default_buckets(256)})


def test_an_earlier_curve_without_the_largest_batch_is_continued_in_proportion() -> None:
    clock = Clock()
    slot = TimedSlot(clock, 0.0, 2e-3)
    built = {b: 1e-3 * b for b in default_buckets(128)}
    curve = warm_up({"fp32": slot}, layout_of(), {"fp32": built}, clock=clock)["fp32"]
    assert curve[256] == pytest.approx(2e-3 * 256)


def test_without_an_earlier_curve_only_what_ran_is_told() -> None:
    clock = Clock()
    slot = TimedSlot(clock, 0.0, 2e-3)
    curve = warm_up({"fp32": slot}, layout_of(), {"int8": {1: 1.0}}, clock=clock)["fp32"]
    assert set(curve) == set(slot.ran)


def test_the_largest_batch_runs_when_the_earlier_curve_says_that_it_is_quick() -> None:
    """From one row alone, 4 ms a row, nobody could know."""
    built = dict.fromkeys(default_buckets(256), 0.004)
    for expected, runs in (({"fp32": built}, True), ({}, False)):
        clock = Clock()
        slot = TimedSlot(clock, 4e-3, 0.0)
        warm_up({"fp32": slot}, layout_of(), expected, clock=clock)
        assert (slot.ran[2] == 256) is runs


def test_a_variant_that_cannot_run_zeros_has_no_curve_and_the_others_have() -> None:
    clock = Clock()
    slots = {"fp32": RefusingSlot(clock, 0.0, 0.0), "int8": TimedSlot(clock, 1e-3, 0.0)}
    curves = warm_up(dict(slots), layout_of(4), clock=clock)
    assert curves["fp32"] == {}
    assert set(curves["int8"]) == {1, 2, 4}


def test_a_probe_runs_the_smallest_batch_and_raises_what_it_raises() -> None:
    clock = Clock()
    slot = TimedSlot(clock, 1e-3, 0.0)
    probe(slot, layout_of())
    assert slot.ran == [1]
    with pytest.raises(EngineError):
        probe(RefusingSlot(clock, 0.0, 0.0), layout_of())
