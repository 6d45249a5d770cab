"""The sequential tests keep their promises: rare false alarms, quick detection, slow trust."""

from __future__ import annotations

import random

from vernier.serving.monitoring.drift import DriftAlarm, Hypotheses, RecoveryTest


def samples_until_alarm(share_over: float, seed: int, most: int) -> int | None:
    alarm, chance = DriftAlarm(), random.Random(seed)
    for n in range(1, most + 1):
        if alarm.add(chance.random() < share_over):
            return n
    return None


def test_a_sound_variant_hardly_ever_raises_the_alarm() -> None:
    alarms = sum(samples_until_alarm(0.01, seed, 2000) is not None for seed in range(200))
    assert alarms <= 20  # at most 400,000 samples × 1e-4 / 2000 of the runs, with room for chance


def test_a_broken_variant_is_found_within_a_few_dozen_samples() -> None:
    found = [samples_until_alarm(0.5, seed, 1000) for seed in range(200)]
    assert None not in found
    assert sorted(n for n in found if n)[190] <= 40


def test_a_tail_of_a_tenth_is_found_although_the_mean_hardly_moves() -> None:
    found = [samples_until_alarm(0.1, seed, 2000) for seed in range(200)]
    assert sum(n is not None for n in found) >= 198


def test_one_bad_sample_is_no_alarm_and_five_in_a_row_are() -> None:
    alarm = DriftAlarm()
    assert not alarm.add(True)
    assert [alarm.add(True) for _ in range(4)][-1]


def test_trust_takes_sustained_evidence_and_a_setback_costs_it() -> None:
    test = RecoveryTest()
    needed = next(n for n in range(1, 1000) if test.add(False))
    assert 50 < needed < 120
    again = RecoveryTest()
    for _ in range(needed - 1):
        assert not again.add(False)
    assert not again.add(True)
    assert not again.add(False)


def test_evidence_is_the_log_likelihood_ratio() -> None:
    h = Hypotheses(sound=0.25, broken=0.5)
    assert abs(h.over - 0.6931471805599453) < 1e-12
    assert abs(h.within - -0.4054651081081644) < 1e-12
