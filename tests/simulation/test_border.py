"""Fronts, engine processes and their deaths in virtual time. VERNIER_SIMULATE=seed repeats a run that has failed."""

from __future__ import annotations

import gc
import os
from collections import Counter

import pytest

from tests.support.border_simulation import simulate

STEPS = 500
REPEATED = os.environ.get("VERNIER_SIMULATE")


def runs(first: int, count: int) -> list[int]:
    return [int(REPEATED)] if REPEATED else list(range(first, first + count))


def play(seeds: list[int], engines: int = 1) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            seen.update(simulate(seed, STEPS, engines))
        except BaseException:
            print(f"VERNIER_SIMULATE={seed} repeats this run")
            raise
    return seen


def test_every_request_ends_once_and_right_whoever_dies() -> None:
    seen = play(runs(0, 100))
    if not REPEATED:
        kinds = {
            "EngineError",
            "DeadlineExceeded",
            "EngineRestarting",
            "UnknownVersion",
            "Draining",
            "QueueFull",
        }
        assert kinds <= seen.keys(), "the runs do not reach everything that can happen"


def test_the_same_with_several_engine_processes() -> None:
    seen = play(runs(0, 50), engines=2) + play(runs(50, 50), engines=3)
    if not REPEATED:
        assert {"EngineError", "DeadlineExceeded", "Draining", "QueueFull"} <= seen.keys()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("engines", [1, 2])
def test_a_million_steps(engines: int) -> None:
    play(runs(10_000, 2000), engines)


def test_no_descriptor_is_left_behind() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for seed in range(5):
        simulate(seed, 200)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
