"""What proves nothing is refused, what is doubtful is a warning, and sound evidence gets neither."""

from __future__ import annotations

import numpy as np
import pytest

from vernier.accuracy import find_task
from vernier.budget import Budget, Judge
from vernier.builder.progress import NoProgress
from vernier.builder.samples import weighing
from vernier.builder.samples.data import ArraySamples, split_apart
from vernier.builder.samples.survey import Survey, independent, join_groups, survey, surveyed
from vernier.errors import GateRefused

RANDOM = np.random.default_rng(0)


def look(**arrays: np.ndarray) -> Survey:
    return survey(ArraySamples(arrays))


def codes(warnings: weighing.Warnings) -> list[str]:
    assert all(w.message and "\n" not in w.message for w in warnings)
    return [warning.code for warning in warnings]


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_the_number_of_samples_is_the_one_at_which_none_outside_just_shows_it() -> None:
    assert weighing.samples_needed(0.01) == 299
    assert weighing.samples_needed(0.001) == 2995
    for share in (0.5, 0.05, 0.0095):
        count = weighing.samples_needed(share)
        assert (1 - share) ** count <= 0.05 < (1 - share) ** (count - 1)
        assert weighing.most_outside(count) <= share < weighing.most_outside(count - 1)


def test_sound_data_is_not_doubted() -> None:
    one, other = look(x=floats(300, 4)), look(x=floats(300, 4))
    assert weighing.weigh_calibration(one, 300, quantizes=True) == []
    assert weighing.weigh_evaluation(other, 300, reduces=True) == []
    assert weighing.weigh_overlap(one, other) == []


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_calibration_without_a_range_is_refused_where_something_is_quantized(value: float) -> None:
    found = look(x=np.full((200, 4), value, np.float32))
    with pytest.raises(GateRefused, match=r"spans no range.*give --calibration"):
        weighing.weigh_calibration(found, 200, quantizes=True)
    assert weighing.weigh_calibration(found, 200, quantizes=False) == []


def test_copies_of_one_sample_are_refused() -> None:
    found = look(x=np.repeat(floats(1, 4), 50, axis=0))
    with pytest.raises(GateRefused, match="all 50 calibration samples are copies"):
        weighing.weigh_calibration(found, 50, quantizes=True)
    with pytest.raises(GateRefused, match=r"all 50 evaluation samples are copies.*give --eval"):
        weighing.weigh_evaluation(found, 1, reduces=True)
    ids = look(ids=np.full((50, 2), 7))  # no float input at all
    with pytest.raises(GateRefused, match="copies of one"):
        weighing.weigh_calibration(ids, 50, quantizes=True)


def test_one_group_is_refused() -> None:
    with pytest.raises(GateRefused, match=r"one group.*several groups"):
        weighing.weigh_evaluation(survey(ArraySamples({"x": floats(50, 4)}), np.zeros(50)), 1, reduces=True)


def test_an_input_that_never_changes_is_named() -> None:
    found = look(x=floats(300, 4), state=np.zeros((300, 8), np.float32), rate=np.full((300,), 16000))
    (warning,) = weighing.weigh_calibration(found, 300, quantizes=True)
    assert warning.code == "calibration_constant_inputs"
    assert "'state', 'rate' never changes in the calibration data" in warning.message


def test_few_calibration_samples_say_how_many_fresh_ones_lie_beyond() -> None:
    (warning,) = weighing.weigh_calibration(look(x=floats(2, 4)), 2, quantizes=True)
    assert warning.code == "few_calibration_samples"
    assert "2 independent samples" in warning.message
    assert "one fresh sample in 3 (33%)" in warning.message
    # The largest of n + 1 exchangeable numbers is the last with a chance of 1 / (n + 1).
    drawn = np.random.default_rng(1).standard_normal((20_000, 3))
    assert np.mean(drawn[:, 2] > drawn[:, :2].max(axis=1)) == pytest.approx(1 / 3, abs=0.02)


def test_copies_count_once() -> None:
    x = floats(100, 4)
    found = look(x=np.concatenate([x, x[:50]]))
    assert (found.samples, found.distinct, found.independent) == (150, 100, 100)
    (warning,) = weighing.weigh_evaluation(found, 100, reduces=True)
    assert warning.code == "evaluation_copies"
    assert "only 100 of 150" in warning.message


def test_samples_in_both_sets_are_counted() -> None:
    x = floats(100, 4)
    (some,) = weighing.weigh_overlap(look(x=x), look(x=np.concatenate([x[:7], floats(93, 4)])))
    assert some.code == "calibration_overlap"
    assert "of the 100 evaluation samples 7 are calibration samples too" in some.message
    (whole,) = weighing.weigh_overlap(look(x=x), look(x=x[::-1]))
    assert "all 100 evaluation samples" in whole.message


def test_groups_are_joined_by_keys_and_by_copies() -> None:
    fingerprints = np.array(["a", "b", "a", "c", "d"])
    assert join_groups(fingerprints, None).tolist() == [0, 1, 0, 2, 3]
    assert join_groups(fingerprints, np.array(["u", "v", "w", "w", "v"])).tolist() == [0, 1, 0, 0, 1]
    rows = np.array([[1, 2], [2, 3], [3, 4], [9, 9], [8, 8]])  # two rows of data to a sample
    assert join_groups(np.arange(5), rows).tolist() == [0, 0, 0, 1, 2]


def test_groups_shared_by_both_sets_are_counted() -> None:
    (warning,) = weighing.weigh_groups_shared(np.array(["a", "b"]), np.array(["b", "c", "c", "d"]))
    assert warning.code == "group_overlap"
    assert "1 of 3 groups" in warning.message
    assert weighing.weigh_groups_shared(np.array([1]), np.array([2])) == []


def test_a_split_keeps_groups_apart() -> None:
    samples = ArraySamples({"x": floats(96, 4)})
    surveyed(samples, np.arange(96) // 11, NoProgress())
    assert independent(samples) == 9
    first, second = split_apart(samples, 32)
    assert len(first) + len(second) == 96
    assert 22 <= len(first) <= 44
    assert first.groups is not None
    assert second.groups is not None
    assert not set(first.groups.tolist()) & set(second.groups.tolist())


def test_constant_answers_are_refused_and_one_constant_output_is_named() -> None:
    same = np.repeat(floats(1, 3), 60, axis=0)
    with pytest.raises(GateRefused, match="60 evaluation samples prove nothing: FP32 answers the same"):
        weighing.weigh_answers({"y": same + np.float32(1e-7)}, reduces=True)
    with pytest.raises(GateRefused, match="there is one evaluation sample"):
        weighing.weigh_answers({"y": floats(1, 3)}, reduces=True)
    assert codes(weighing.weigh_answers({"y": same}, reduces=False)) == ["constant_outputs"]
    (warning,) = weighing.weigh_answers({"y": floats(60, 3), "z": same}, reduces=True)
    assert "'z'" in warning.message
    assert "'y'" not in warning.message
    assert weighing.weigh_answers({"y": floats(60, 3) * 1e-3 + 1}, reduces=True) == []


def judge(labels: np.ndarray | None, outputs: np.ndarray, text: str) -> Judge:
    return Judge(Budget.parse(text), {"y": outputs}, labels)


@pytest.mark.parametrize("metric", ["accuracy", "auc", "rmse", "log_loss"])
def test_labels_in_another_order_are_told_from_labels_that_belong(metric: str) -> None:
    random = np.random.default_rng(3)
    probability = random.random((200, 1))
    labels = (random.random((200, 1)) < probability).astype(np.int64)
    outputs: np.ndarray = probability
    if metric == "accuracy":
        outputs = np.concatenate([1 - probability, probability], axis=1)
    if metric != "rmse":
        labels = labels[:, 0]
    task = find_task({"y": outputs}, labels, metric, "y")
    assert not weighing.is_at_chance(task, {"y": outputs}, labels)
    assert weighing.is_at_chance(task, {"y": outputs}, np.random.default_rng(4).permutation(labels))


def test_labels_without_meaning_and_labels_of_one_kind_are_warned_of() -> None:
    outputs = np.eye(4, dtype=np.float32)[RANDOM.integers(0, 4, 300)]
    right = outputs.argmax(axis=1)
    assert weighing.weigh_labels(judge(right, outputs, "accuracy>=99%")) == []
    assert codes(weighing.weigh_labels(judge(right[::-1].copy(), outputs, "accuracy>=99%"))) == [
        "labels_at_chance"
    ]
    assert codes(weighing.weigh_labels(judge(right * 0, outputs, "accuracy>=99%"))) == ["constant_labels"]
    # Labels that no term of the budget reads may be anything.
    assert weighing.weigh_labels(judge(right[::-1].copy(), outputs, "max_abs<=0.1")) == []


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        ("accuracy>=99%", 373),  # FP32's is 0.8: 0.008 may be lost
        ("accuracy>=0.7", 29),
        ("max_abs<=0.1", 299),
        ("rel_l2.p99<=0.1", 299),
        ("rel_l2.p90<=0.1", 29),
        ("cosine.min>=0.9", 299),
        ("top1>=0.999", 2995),
        ("log_loss>=95%", 59),
    ],
)
def test_a_claim_needs_as_many_independent_samples_as_the_formula_says(budget: str, count: int) -> None:
    right = np.arange(1000) % 10
    outputs = np.eye(10, dtype=np.float32)[np.where(np.arange(1000) % 5 == 0, (right + 1) % 10, right)]
    found = judge(right, outputs, budget)
    assert weighing.weigh_claims(found, count, 1000) == []
    (warning,) = weighing.weigh_claims(found, count - 1, 1000)
    assert f"{count:,} for {budget}" in warning.message
    assert f"{count - 1:,} independent samples (1,000 in all)" in warning.message
    assert warning.code == ("few_labels" if budget.startswith(("accuracy", "log")) else "few_samples")


def test_ranges_of_zero_are_named_and_nothing_else_is_refused() -> None:
    assert weighing.weigh_ranges({"a": 1.0, "b": 2.0}, ["a", "b"]) == []
    (warning,) = weighing.weigh_ranges({"a": 0.0, "b": 2.0}, ["a", "b"])
    assert warning.code == "zero_ranges"
    assert "1 of 2 quantized activations were zero in every calibration sample ('a')" in warning.message
    with pytest.raises(GateRefused, match="INT8 has no range"):
        weighing.weigh_ranges({"a": 0.0}, ["a"])
