"""Which settings are tried, and which of them is the best."""

from __future__ import annotations

from tests.support.specs import make_manifest
from vernier.settings import ModelSettings
from vernier.tune.candidates import (
    Measured,
    SettingsCandidate,
    batch_choices,
    best,
    bucket_choices,
    delay_choices,
    neighbours,
    pareto,
    sequence_choices,
)

CURVE = {1: 0.002, 2: 0.003, 4: 0.005, 8: 0.009, 16: 0.017}


def test_the_largest_batches_that_leave_the_objective_in_reach_are_tried() -> None:
    assert batch_choices(CURVE, 0.020, slots=1) == [8, 4, 2]
    assert batch_choices(CURVE, 1.0, slots=1) == [16, 8, 4]
    assert batch_choices(CURVE, 0.001, slots=1) == [1]


def test_delays_stay_well_below_the_objective() -> None:
    assert delay_choices(20) == [0, 2, 5]
    assert delay_choices(2) == [0, 0.5]


def test_bucket_sets_end_in_the_largest_batch_and_differ_from_the_packages_own() -> None:
    assert bucket_choices(8, [1, 2, 4, 8]) == [None, (2, 8), (8,)]
    assert bucket_choices(16, [1, 4, 16, 64]) == [None, (1, 16), (16,)]
    assert bucket_choices(1, [1]) == [None]


def test_lengths_are_tried_coarser_finer_and_alone() -> None:
    manifest = make_manifest(
        inputs=[{"name": "x", "dtype": "float32", "shape": ["batch", "frames"]}],
        dims={"batch": {"min": 1, "opt": 8, "max": 16}, "frames": {"min": 10, "opt": 20, "max": 80}},
        sequence=[{"dim": "frames", "buckets": [20, 40, 80]}],
    )
    assert sequence_choices(manifest) == [
        None,
        {"frames": (20, 80)},
        {"frames": (15, 20, 30, 40, 60, 80)},
        {"frames": (80,)},
    ]
    assert sequence_choices(make_manifest()) == [None]


def test_one_setting_is_changed_at_a_time() -> None:
    at = SettingsCandidate(1, 8, 0.0)
    batches, delays, buckets, sequences = neighbours(at, [8, 4], [0.0, 2.0], [None, (8,)], [None])
    assert batches == [SettingsCandidate(1, 4, 0.0)]
    assert delays == [SettingsCandidate(1, 8, 2.0)]
    assert buckets == [SettingsCandidate(1, 8, 0.0, (8,))]
    assert sequences == []


def test_a_candidate_overrides_the_models_settings_and_leaves_the_others() -> None:
    base = ModelSettings(max_batch=64, precision="int8", buckets=(1, 64))
    made = SettingsCandidate(2, 8, 1.5, sequence_buckets={"frames": (20, 80)}).settings(20.0, base)
    assert (made.slots, made.max_batch, made.max_queue_delay_ms, made.latency_objective_ms) == (2, 8, 1.5, 20)
    assert (made.precision, made.buckets, made.sequence_buckets) == ("int8", None, {"frames": (20, 80)})


def measured(sustained: float, p99_ms: float | None, max_batch: int = 1) -> Measured:
    return Measured(SettingsCandidate(1, max_batch, 0.0), sustained, p99_ms, p99_ms)


def test_the_front_has_what_no_other_beats() -> None:
    fast, quick, beaten = measured(100, 9), measured(60, 4), measured(60, 5)
    assert pareto([beaten, fast, quick, measured(30, None), measured(0, 1)]) == [fast, quick]


def test_the_best_sustains_most_and_among_equals_answers_soonest() -> None:
    slow, soon, less = measured(100, 9), measured(97, 4), measured(80, 1)
    assert best([slow, soon, less]) is soon
    assert best([slow, less]) is slow
    assert best([measured(0, None)]) is None
    assert best([]) is None
