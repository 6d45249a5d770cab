"""Which batches are quicker than handing them over."""

from __future__ import annotations

import pytest

from tests.support.engines import ArithmeticExecutor
from tests.support.schedules import make_batcher
from vernier.engine.base import default_buckets
from vernier.serving.queueing.latency import LatencyCurve
from vernier.serving.scheduling.inline import Inline

BUCKETS = default_buckets(64)


def curve(first_s: float, row_s: float) -> LatencyCurve:
    return LatencyCurve(BUCKETS, True, {b: first_s + b * row_s for b in BUCKETS})


@pytest.fixture
def inline() -> Inline:
    inline = Inline()
    inline.set_hand_over(50e-6)  # the limit is 150 µs
    inline.use("fp32", ArithmeticExecutor().open_slot())
    return inline


def test_the_limit_follows_the_hand_over_within_what_is_harmless() -> None:
    inline = Inline()
    limits = []
    for seconds in (0.0, 50e-6, 1.0):
        inline.set_hand_over(seconds)
        limits.append(inline.limit_s)
    assert limits == pytest.approx([100e-6, 150e-6, 300e-6])


def test_a_variant_within_the_limit_runs_in_batches_as_large_as_the_loop_can_bear(inline: Inline) -> None:
    assert inline.rows("fp32", (), curve(10e-6, 1e-6), 0.0) == 64
    assert inline.rows("fp32", (1,), curve(10e-6, 10e-6), 0.0) == pytest.approx(49, abs=1)
    assert inline.rows("fp32", (3,), curve(100e-6, 40e-6), 0.0) == pytest.approx(10, abs=1)
    assert inline.rows("fp32", (2,), curve(0.01, 0.0), 0.0) == 0


def test_a_variant_without_a_slot_here_never_does(inline: Inline) -> None:
    assert inline.rows("int8", (), curve(1e-6, 0.0), 0.0) == 0
    inline.drop("fp32")
    assert inline.rows("fp32", (), curve(1e-6, 0.0), 0.0) == 0


def test_an_estimate_little_over_the_limit_is_tried_again_after_a_while(inline: Inline) -> None:
    slow = curve(200e-6, 0.0)
    assert [inline.rows("fp32", (), slow, now) for now in (10.0, 10.5, 11.1, 11.2)] == [1, 0, 1, 0]


def test_asking_for_room_does_not_use_up_the_next_try(inline: Inline) -> None:
    slow = curve(200e-6, 0.0)
    assert inline.room("fp32", (), slow) == 0
    assert inline.rows("fp32", (), slow, 10.0) == 1
    assert inline.room("fp32", (1,), curve(10e-6, 1e-6)) == 64
    assert inline.room("int8", (), curve(1e-6, 0.0)) == 0


def test_what_was_slow_once_is_not_given_up(inline: Inline) -> None:
    """The loop's thread is preempted now and then; only what an undisturbed run takes counts."""
    batcher = make_batcher(64, curve=dict.fromkeys(BUCKETS, 2e-05))
    base = batcher.curve("fp32", ())
    assert inline.rows("fp32", (), base, 0.0) == 64
    batch = type("Ran", (), {"precision": "fp32", "shape": (), "rows": 8, "compute_s": 0.005})()
    for _ in range(20):
        inline.ran(batch)
    assert inline.rows("fp32", (), base, 0.0) > 0


def test_only_variants_that_may_be_quick_enough_are_worth_a_slot() -> None:
    inline = Inline()
    assert inline.worth_having(curve(20e-6, 1e-6))
    assert inline.worth_having(curve(2 * inline.limit_s, 0.0))
    assert not inline.worth_having(curve(0.005, 0.0))
    assert not inline.worth_having(LatencyCurve(BUCKETS, True))
