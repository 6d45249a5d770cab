"""Estimates: what an execution will take, and how fast work arrives."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vernier.serving.queueing.latency import ArrivalRate, LatencyCurve, Margin

BUCKETS = [1, 2, 4, 8, 16]


def measured(exact: bool = True) -> LatencyCurve:
    return LatencyCurve(BUCKETS, exact, {b: 0.001 + 0.0001 * b for b in BUCKETS})


def test_nothing_is_predicted_before_anything_is_known() -> None:
    curve = LatencyCurve(BUCKETS, True)
    assert not curve.known
    assert curve.seconds(7) == 0.0


@pytest.mark.parametrize("rows", [1, 3, 5, 8, 11, 16])
def test_exact_batches_are_interpolated_and_padded_ones_take_their_buckets_time(rows: int) -> None:
    assert measured().seconds(rows) == pytest.approx(0.001 + 0.0001 * rows)
    bucket = next(b for b in BUCKETS if b >= rows)
    padded = measured(exact=False)
    assert padded.bucket(rows) == bucket
    assert padded.seconds(rows) == pytest.approx(0.001 + 0.0001 * bucket)


def test_rows_within_is_the_inverse_of_seconds() -> None:
    for exact in (True, False):
        curve = measured(exact)
        for rows in BUCKETS if not exact else range(1, 17):
            assert curve.rows_within(curve.seconds(rows) + 1e-9) == rows
        assert curve.rows_within(0.0001) == 0
        assert curve.rows_within(9.0) == 16


def test_unmeasured_buckets_are_guessed_from_measured_ones() -> None:
    curve = LatencyCurve(BUCKETS, True, {2: 0.002, 8: 0.005})
    assert curve.seconds(1) == 0.002
    assert curve.seconds(4) == pytest.approx(0.003)
    assert curve.seconds(16) == pytest.approx(0.010)


def test_the_first_measurement_is_believed() -> None:
    curve = LatencyCurve(BUCKETS, False)
    curve.observe(4, 0.004)
    assert curve.seconds(4) == curve.seconds(1) == 0.004
    assert curve.seconds(16) == pytest.approx(0.016)


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.4, 5.0])
def test_it_follows_a_machine_that_has_become_slower_or_faster(factor: float) -> None:
    curve, random = measured(), Random(1)
    for _ in range(300):
        rows = random.randint(1, 16)
        curve.observe(rows, factor * (0.001 + 0.0001 * rows) * random.uniform(0.95, 1.05))
    for rows in (1, 6, 16):
        assert curve.seconds(rows) == pytest.approx(factor * (0.001 + 0.0001 * rows), rel=0.1)


def test_a_large_batch_that_was_disturbed_when_it_was_measured_is_tried_again() -> None:
    curve = LatencyCurve(BUCKETS, False, {1: 0.006, 2: 0.3, 4: 0.3, 8: 0.3, 16: 0.3})
    for _ in range(40):
        curve.observe(1, 0.006)
    assert curve.seconds(16) == 0.3, "a bucket is believed for a while"
    for _ in range(40):
        curve.observe(1, 0.006)
    assert [curve.seconds(rows) for rows in BUCKETS] == pytest.approx([0.006 * rows for rows in BUCKETS])
    curve.observe(4, 0.008)
    assert curve.seconds(16) <= 0.3 * 16 / 4


def test_a_batch_that_really_takes_longer_than_its_parts_keeps_its_time_while_it_runs() -> None:
    curve = LatencyCurve(BUCKETS, False, {1: 0.001, 2: 0.001, 4: 0.001, 8: 0.001, 16: 0.05})
    for _ in range(200):
        curve.observe(1, 0.001)
        curve.observe(16, 0.05)
    assert curve.seconds(16) == pytest.approx(0.05)


def test_a_single_stall_moves_it_little() -> None:
    curve = measured()
    for _ in range(20):
        curve.observe(8, curve.seconds(8))
    before = curve.seconds(8)
    curve.observe(8, 100.0)
    assert curve.seconds(8) < 1.2 * before


def test_the_undisturbed_time_is_the_quick_one_even_when_half_of_the_runs_are_disturbed() -> None:
    curve, usual = measured().copy(undisturbed=True), measured()
    for i in range(400):
        seconds = 0.0018 * (10.0 if i % 2 else 1.0)
        curve.observe(8, seconds)
        usual.observe(8, seconds)
    assert curve.seconds(8) < 1.3 * 0.0018 < usual.seconds(8)


def test_noise_widens_the_pessimistic_estimate() -> None:
    quiet, noisy, random = measured(), measured(), Random(2)
    for _ in range(300):
        quiet.observe(8, 0.0018)
        noisy.observe(8, 0.0018 * random.uniform(0.6, 1.4))
    assert quiet.pessimistic(8) < 1.05 * quiet.seconds(8)
    assert noisy.pessimistic(8) > 1.2 * noisy.seconds(8)
    assert noisy.worst_s >= noisy.pessimistic(8)


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 16), st.floats(1e-6, 10.0)), max_size=60),
)
def test_more_rows_never_take_less_time(exact: bool, runs: list[tuple[int, float]]) -> None:
    curve = LatencyCurve(BUCKETS, exact)
    for rows, seconds in runs:
        curve.observe(rows, seconds)
    predicted = [curve.seconds(rows) for rows in range(1, 17)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(predicted))


@pytest.mark.parametrize("rate", [20.0, 1000.0, 30000.0])
def test_the_arrival_rate_is_found_quickly_and_forgotten_quickly(rate: float) -> None:
    random, estimate, now = Random(3), ArrivalRate(), 100.0
    estimate.per_second(now)
    end = now + max(0.2, 20 / rate)
    while now < end:
        now += random.expovariate(rate)
        estimate.add(1)
        found = estimate.per_second(now)
    assert found == pytest.approx(rate, rel=0.6 if rate < 100 else 0.3)
    assert estimate.per_second(now + 1.0) < 0.1 * rate


def test_with_the_margin_one_in_two_hundred_answers_comes_too_late() -> None:
    margin, rng = Margin(), np.random.default_rng(0)
    for late_s in rng.exponential(0.004, 60_000):  # beyond the prediction, which was the latest allowed
        margin.observe(float(late_s) > margin.seconds, 0.1)
    assert margin.seconds == pytest.approx(0.004 * np.log(200), rel=0.25)


def test_the_margin_neither_rewards_haste_nor_takes_all_that_is_allowed() -> None:
    margin = Margin()
    margin.observe(False, 0.1)
    assert margin.seconds == 0
    for _ in range(10_000):
        margin.observe(True, 0.1)
    assert margin.seconds == pytest.approx(0.05)
    for _ in range(100_000):
        margin.observe(False, 0.1)
    assert margin.seconds < 0.003
