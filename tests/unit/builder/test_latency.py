"""Latency is measured in turns and in bounded time, and a tie goes to the safer variant."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from vernier.builder.progress import NoProgress
from vernier.builder.searching.latency import Latencies, batches_of, fastest, measure, relative_time
from vernier.engine.base import Executor, Slot, StageTimes
from vernier.package.manifest import Batching
from vernier.tensors import Arrays, TensorSpec


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now


class TimedSlot(Slot):
    """Takes a known time per row on the given clock."""

    def __init__(self, name: str, seconds_per_row: float, clock: Clock) -> None:
        self._name, self._seconds, self._clock, self._views = name, seconds_per_row, clock, {}

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        self._views = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return self._views

    def run(self) -> Arrays:
        self._clock.now += self._seconds * len(self._views["x"])
        self._clock.order.append(self._name)
        return {}

    @property
    def last_times(self) -> StageTimes:
        return StageTimes()

    def close(self) -> None:
        self._views = {}


class TimedExecutor(Executor):
    inputs = (TensorSpec("x", "float32", ("batch",)),)

    def __init__(self, name: str, seconds_per_row: float, clock: Clock) -> None:
        self._make = lambda: TimedSlot(name, seconds_per_row, clock)

    def open_slot(self) -> Slot:
        return self._make()

    def close(self) -> None:
        return


def run(speeds: dict[str, float], buckets: list[int], limit_s: float = 60.0) -> tuple[Latencies, Clock]:
    clock = Clock()
    executors = {name: TimedExecutor(name, seconds, clock) for name, seconds in speeds.items()}
    batching = Batching(kind="dynamic", dim="batch", buckets=buckets)
    batches = batches_of({"x": np.ones(3, np.float32)}, batching)
    return measure(executors, batches, NoProgress(), limit_s=limit_s, clock=clock), clock


def test_the_median_of_every_bucket_is_in_milliseconds() -> None:
    found, _ = run({"fp32": 0.002, "int8": 0.001}, [1, 2, 4])
    assert found.median["fp32"] == pytest.approx({1: 2.0, 2: 4.0, 4: 8.0})
    assert found.median["int8"] == pytest.approx({1: 1.0, 2: 2.0, 4: 4.0})
    assert found.undisturbed == found.median
    assert relative_time(found.median["int8"], found.median["fp32"]) == pytest.approx(0.5)


def test_variants_take_turns() -> None:
    _, clock = run({"a": 0.01, "b": 0.01}, [1])
    timed = clock.order[4:]
    assert set(timed[::2]) == {"a"}
    assert set(timed[1::2]) == {"b"}


def test_buckets_that_would_take_too_long_are_left_out_but_never_the_first() -> None:
    found, clock = run({"fp32": 0.1}, [1, 2, 4, 8, 16, 32, 64], limit_s=8.0)
    assert 1 in found.median["fp32"]
    assert 64 not in found.median["fp32"]
    assert clock.now < 12.0
    found, _ = run({"fp32": 50.0}, [1, 2], limit_s=8.0)
    assert list(found.median["fp32"]) == [1]


def test_a_tie_goes_to_the_safer_variant() -> None:
    curves = {"fp32": {1: 1.0, 8: 4.0}, "fp16": {1: 0.99, 8: 3.85}, "int8": {1: 0.6, 8: 2.0}}
    latencies = Latencies(curves, curves)
    assert fastest(latencies, ["fp32", "fp16", "int8"]) == "int8"
    assert fastest(latencies, ["fp32", "fp16"]) == "fp32"
    assert fastest(latencies, ["fp32"]) == "fp32"


def test_one_disturbed_bucket_decides_nothing() -> None:
    exact = {1: 1.0, 2: 1.5, 4: 2.0, 8: 40.0}
    curves = {"fp32": exact, "fp16": {1: 1.0, 2: 1.5, 4: 2.0, 8: 4.0}}
    assert relative_time(curves["fp16"], exact) < 0.6
    assert fastest(Latencies(curves, curves), ["fp32", "fp16"]) == "fp32"


def test_models_without_a_batch_run_one_sample_and_fixed_ones_their_size() -> None:
    samples = {"x": np.arange(6, dtype=np.float32).reshape(3, 2)}
    assert [(b, i["x"].shape) for b, i in batches_of(samples, Batching(kind="none"))] == [(1, (2,))]
    fixed = batches_of(samples, Batching(kind="fixed", size=4, buckets=[4]))
    assert [(b, i["x"].shape) for b, i in fixed] == [(4, (4, 2))]
