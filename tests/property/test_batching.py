"""The policy in virtual time: what must hold of every schedule of arrivals, deadlines and cancellations.

SCHEDULES=100000 pytest tests/property/test_batching.py        the long run, seconds per thousand
"""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.scheduler.simulation import Arrival, Simulation
from tests.support.schedules import make_batcher, play, random_schedule
from vernier.serving.queueing.admission import Policy

SCHEDULES = int(os.environ.get("SCHEDULES", "3000"))
SHARDS = 10


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_random_schedule_keeps_the_rules(shard: int) -> None:
    outcomes = set()
    for seed in range(shard, SCHEDULES, SHARDS):
        try:
            trace = play(random_schedule(Random(seed)))
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        outcomes |= {request.outcome for request in trace.requests}
    assert outcomes == {
        "answered",
        "failed",
        "expired",
        "cancelled",
        "refused",
    }  # the schedules reach everything


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_schedules_that_hypothesis_can_shrink_keep_the_rules(random: Random) -> None:
    play(random_schedule(random))


@pytest.mark.parametrize("gap", [1, 3, 18])
def test_the_lowest_priority_does_not_starve(gap: int) -> None:
    """Urgent requests that would keep the slot busy for ever pass it by for `gap` times `age_s` and no longer."""
    age_s, run_s = 0.02, 0.001
    batcher = make_batcher(4, policy=Policy(age_s=age_s, queue_limit=10**6), curve={1: run_s, 4: run_s})
    flood = [Arrival(i * run_s / 8, priority=gap - 9) for i in range(int(8 * 2 * gap * age_s / run_s) + 200)]
    poor = Arrival(10 * run_s, priority=-9)
    simulation = Simulation(batcher, 1, lambda rows: run_s)
    trace = simulation.run(sorted([*flood, poor], key=lambda a: a.at))
    waited = next(request for request in trace.requests if request.arrival is poor).latency_s
    # The flood is twice what the slot can do: the head of its line ages at half the pace of time.
    assert gap * age_s * 0.5 < waited < 2 * gap * age_s + 20 * run_s


def test_without_a_deadline_a_request_is_not_overtaken_for_ever_by_those_that_have_one() -> None:
    run_s = 0.001
    batcher = make_batcher(1, policy=Policy(age_s=0.05, queue_limit=10**6), curve={1: run_s})
    flood = [Arrival(i * run_s / 1.2, timeout_s=0.02) for i in range(400)]
    patient = Arrival(5 * run_s)
    trace = Simulation(batcher, 1, lambda rows: run_s).run(sorted([*flood, patient], key=lambda a: a.at))
    waited = next(request for request in trace.requests if request.arrival is patient).latency_s
    assert waited < 0.05 + 5 * run_s


@given(st.permutations([3, 1, 2, 5, 4]))
@settings(max_examples=30, deadline=None)
def test_deadlines_are_met_in_their_order_whatever_the_order_of_arrival(order: list[int]) -> None:
    batcher = make_batcher(1, curve={1: 0.01})
    arrivals = [Arrival(0.0), *[Arrival(0.001 * i, timeout_s=1.0 + place) for i, place in enumerate(order)]]
    trace = Simulation(batcher, 1, lambda rows: 0.01).run(arrivals)
    ran = [execution.deadline for execution in trace.executions[1:]]
    assert ran == sorted(d for d in ran if d is not None)
