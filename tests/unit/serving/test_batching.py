"""Single decisions of the policy."""

from __future__ import annotations

import pytest

from vernier.engine.base import default_buckets
from vernier.serving.queueing.batching import (
    DEADLINE,
    DELAY,
    FULL,
    IDLE,
    Dispatch,
    Forecast,
    Limits,
    Slots,
    Wait,
    Waiting,
    batch_cap,
    decide,
)
from vernier.serving.queueing.latency import LatencyCurve

FLAT = dict.fromkeys(default_buckets(16), 0.010)
LINEAR = {bucket: 0.001 * bucket for bucket in default_buckets(16)}
LIMITS = Limits(16, max_queue_delay_s=0.005)
ONE_IDLE, ONE_OF_TWO = Slots(1, 1), Slots(1, 2)


def curve(seconds: dict[int, float] = FLAT, exact: bool = True) -> LatencyCurve:
    return LatencyCurve(default_buckets(16), exact, seconds)


@pytest.mark.parametrize("rate", [0.0, 10.0, 10_000.0])
def test_a_full_batch_leaves_at_once(rate: float) -> None:
    assert decide(Waiting(16, 1, 0.0, None), 0.0, ONE_IDLE, curve(), rate, LIMITS) == Dispatch(16, FULL)
    assert decide(Waiting(90, 1, 0.0, None), 0.0, ONE_IDLE, curve(), rate, LIMITS) == Dispatch(16, FULL)


@pytest.mark.parametrize("rate", [0.0, 10.0, 10_000.0])
@pytest.mark.parametrize("slots", [1, 3])
def test_nothing_waits_while_every_slot_is_idle(slots: int, rate: float) -> None:
    verdict = decide(Waiting(1, 1, 0.0, None), 0.0, Slots(slots, slots), curve(), rate, LIMITS)
    assert verdict == Dispatch(1, IDLE)


def test_while_another_slot_runs_a_batch_waits_for_what_joining_saves_of_each_slot() -> None:
    # Two batches of one row take 20 ms, one of two rows takes 10: half of what is saved is for each of two slots.
    assert decide(Waiting(1, 1, 1.0, None), 1.0, ONE_OF_TWO, curve(), 1000.0, LIMITS) == Wait(1.005)
    assert decide(Waiting(1, 1, 1.0, None), 1.003, ONE_OF_TWO, curve(), 1000.0, LIMITS) == Wait(1.005)
    assert decide(Waiting(1, 1, 1.0, None), 1.005, ONE_OF_TWO, curve(), 1000.0, LIMITS) == Dispatch(1, DELAY)
    assert decide(Waiting(1, 1, 1.0, None), 1.0, Slots(1, 4), curve(), 1000.0, LIMITS) == Wait(1.0025)


def test_it_does_not_wait_when_nothing_should_come_meanwhile() -> None:
    verdict = decide(Waiting(1, 1, 0.0, None), 0.0, ONE_OF_TWO, curve(), 150.0, LIMITS)
    assert verdict == Dispatch(1, IDLE)


@pytest.mark.parametrize("rate", [10.0, 1e3, 1e5])
def test_it_never_waits_where_batches_gain_nothing(rate: float) -> None:
    verdict = decide(Waiting(2, 1, 0.0, None), 0.0, ONE_OF_TWO, curve(LINEAR), rate, LIMITS)
    assert verdict == Dispatch(2, IDLE)


def test_it_does_not_know_enough_to_wait_without_a_curve() -> None:
    verdict = decide(Waiting(1, 1, 0.0, None), 0.0, ONE_OF_TWO, curve({}), 1000.0, LIMITS)
    assert verdict == Dispatch(1, IDLE)


def test_the_longest_delay_ends_any_waiting() -> None:
    limits = Limits(16, max_queue_delay_s=0.001)
    first = decide(Waiting(1, 1, 0.0, None), 0.0, ONE_OF_TWO, curve(), 1000.0, limits)
    assert first == Wait(0.001)
    assert decide(Waiting(1, 1, 0.0, None), 0.001, ONE_OF_TWO, curve(), 1000.0, limits) == Dispatch(1, DELAY)


def test_a_tight_deadline_ends_waiting_before_the_delay_does() -> None:
    due = 0.0102
    first = decide(Waiting(1, 1, 0.0, due), 0.0, ONE_OF_TWO, curve(), 1000.0, LIMITS)
    assert isinstance(first, Wait)
    assert first.until == pytest.approx(due - 0.010)
    verdict = decide(Waiting(1, 1, 0.0, due), 0.0003, ONE_OF_TWO, curve(), 1000.0, LIMITS)
    assert verdict == Dispatch(1, DEADLINE)


def test_a_batch_shrinks_for_a_deadline_that_only_a_smaller_one_meets() -> None:
    verdict = decide(Waiting(16, 1, 0.0, 0.0041), 0.0, ONE_IDLE, curve(LINEAR), 100.0, LIMITS)
    assert verdict == Dispatch(4, DEADLINE)


def test_a_batch_does_not_shrink_when_smaller_ones_could_not_keep_up() -> None:
    # 1 ms a row, and a fixed 4 ms: batches of 4 do 500 rows a second, and 700 arrive.
    steep = {bucket: 0.004 + 0.001 * bucket for bucket in default_buckets(16)}
    verdict = decide(Waiting(16, 1, 0.0, 0.0081), 0.0, ONE_IDLE, curve(steep), 700.0, LIMITS)
    assert verdict == Dispatch(16, FULL)


def test_a_hopeless_deadline_does_not_shrink_the_batch_either() -> None:
    verdict = decide(Waiting(16, 1, 0.0, 0.0001), 0.0, ONE_IDLE, curve(LINEAR), 1.0, LIMITS)
    assert verdict == Dispatch(16, FULL)


@pytest.mark.parametrize(("rows", "expected"), [(8, 8), (9, 8), (15, 15)])
def test_padding_up_or_cutting_down_whichever_answers_sooner(rows: int, expected: int) -> None:
    """With padding, 9 rows cost 16: eight now and one after are quicker; fifteen are not worth cutting."""
    seconds = {bucket: 0.010 + 0.001 * bucket for bucket in default_buckets(16)}
    verdict = decide(Waiting(rows, 1, 0.0, None), 0.0, ONE_IDLE, curve(seconds, False), 1.0, LIMITS)
    assert verdict == Dispatch(expected, IDLE)


def test_a_flat_curve_is_never_cut() -> None:
    assert decide(Waiting(9, 1, 0.0, None), 0.0, ONE_IDLE, curve(FLAT, False), 1.0, LIMITS) == Dispatch(
        9, IDLE
    )


def test_the_first_request_is_never_cut() -> None:
    verdict = decide(Waiting(9, 9, 0.0, None), 0.0, ONE_IDLE, curve(LINEAR, False), 1.0, LIMITS)
    assert verdict == Dispatch(9, IDLE)


def test_the_objective_caps_the_batch_so_that_one_run_and_the_next_fit_in_it() -> None:
    assert batch_cap(curve(LINEAR), Limits(16), 1) == 16
    assert batch_cap(curve(LINEAR), Limits(16, objective_s=0.0161), 1) == 8
    assert batch_cap(curve(LINEAR), Limits(16, objective_s=0.0121), 2) == 8
    assert batch_cap(curve(LINEAR), Limits(16, objective_s=0.0001), 1) == 16  # out of reach: only throughput


def test_predicted_finish_counts_what_runs_what_waits_and_who_joins() -> None:
    linear = curve(LINEAR)

    def finish(rows: int, waiting: int, *free_at: float, rate: float = 0.0) -> float:
        return Forecast(free_at, 1.0, linear, rate, LIMITS).finish(rows, waiting)

    assert finish(1, 0, 0.0) == pytest.approx(1.001)
    assert finish(4, 0, 1.5) == pytest.approx(1.504)
    assert finish(1, 16, 1.5) == pytest.approx(1.5 + 0.016 + 0.001)
    assert finish(1, 40, 1.5) == pytest.approx(1.5 + 2 * 0.016 + 0.009)
    assert finish(1, 40, 1.5, 1.6) == pytest.approx(1.5 + 0.016 + 0.009)
    assert finish(40, 0, 1.0) == pytest.approx(1.0 + 2 * 0.016 + 0.008)
    assert finish(1, 0, 1.5, rate=1e6) == pytest.approx(1.516)
    assert Forecast((5.0,), 1.0, curve({}), 0.0, LIMITS).finish(1, 99) == 1.0
