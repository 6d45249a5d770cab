"""Doubt counts as loss: flips that cancel on a few samples do not look like none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vernier.budget import Budget, Judge
from vernier.builder.searching.caution import CautiousJudge

RANDOM = np.random.default_rng(0)
COUNT = 1000
LABELS = RANDOM.integers(0, 4, COUNT)
REFERENCE = {"y": np.eye(4, dtype=np.float32)[np.where(RANDOM.random(COUNT) < 0.9, LABELS, (LABELS + 1) % 4)]}
WRONG = np.flatnonzero(REFERENCE["y"].argmax(axis=1) != LABELS)
RIGHT = np.flatnonzero(REFERENCE["y"].argmax(axis=1) == LABELS)


def flipped(better: int, worse: int) -> dict[str, np.ndarray]:
    """Reference answers of which so many turn right and so many wrong."""
    answers = REFERENCE["y"].argmax(axis=1)
    # Every 7th, so that blocks of samples get about equally many.
    answers[WRONG[:better]] = LABELS[WRONG[:better]]
    answers[RIGHT[: 7 * worse : 7]] = (LABELS[RIGHT[: 7 * worse : 7]] + 2) % 4
    return {"y": np.eye(4, dtype=np.float32)[answers]}


def used(candidate: dict[str, np.ndarray], text: str = "accuracy>=99%") -> float:
    return CautiousJudge(Judge(Budget.parse(text), REFERENCE, LABELS)).used(candidate)


def test_flips_that_cancel_still_use_up_two_standard_errors() -> None:
    candidate = flipped(20, 20)
    assert Judge(Budget.parse("accuracy>=99%"), REFERENCE, LABELS).judge(candidate).used == 0
    allowed = 0.01 * (1 - len(WRONG) / COUNT)
    assert used(candidate) == pytest.approx(2 * math.sqrt(40) / COUNT / allowed, rel=0.4)


def test_doubt_that_more_samples_will_lessen_counts_less_and_a_loss_as_much() -> None:
    judge = Judge(Budget.parse("accuracy>=99%"), REFERENCE, LABELS)
    cancelling, lost = flipped(20, 20), judge.judge(flipped(0, 5)).used
    assert CautiousJudge(judge, 4 * COUNT).used(cancelling) == pytest.approx(used(cancelling) / 2)
    doubt = used(flipped(0, 5)) - lost
    assert CautiousJudge(judge, 4 * COUNT).used(flipped(0, 5)) == pytest.approx(lost + doubt / 2)


def test_the_same_answers_use_up_nothing() -> None:
    assert used(REFERENCE) == 0


def test_decisions_that_happened_not_to_flip_may_flip_on_the_next_samples() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(size=(300, 2))
    labels = logits.argmax(axis=1)
    margin = np.abs(logits[:, 0] - logits[:, 1])
    # Every answer moves by less than it is ahead, though many are ahead by less than others move.
    moved = 0.9 * np.minimum(margin, 0.2)[:, None] * np.sign(logits - logits[:, ::-1]) / 2
    judge = Judge(Budget.parse("accuracy>=99%"), {"y": logits}, labels)
    candidate = {"y": logits - moved}
    assert judge.judge(candidate).used == 0
    assert CautiousJudge(judge).used(candidate) > 0.5
    assert CautiousJudge(judge).used({"y": logits * 1.1}) == 0


def test_doubt_comes_on_top_of_the_loss() -> None:
    worse = flipped(0, 5)
    plain = Judge(Budget.parse("accuracy>=99%"), REFERENCE, LABELS).judge(worse).used
    assert plain == pytest.approx(0.005 / (0.01 * (1 - len(WRONG) / COUNT)))
    assert used(worse) > plain * 1.2


def test_being_better_by_luck_buys_nothing() -> None:
    assert used(flipped(30, 0)) > 0.3


def test_distances_carry_no_doubt_and_broken_answers_are_infinitely_bad() -> None:
    candidate = {"y": REFERENCE["y"] + np.float32(0.05)}
    assert used(candidate, "max_abs<=0.1") == pytest.approx(0.5, rel=1e-3)
    candidate["y"][3, 1] = np.nan
    assert used(candidate) == math.inf


def test_blocks_in_which_the_metric_does_not_exist_are_left_out() -> None:
    labels = np.zeros(40, int)
    labels[0] = 1
    scores = {"s": np.linspace(1, 0, 40)[:, None]}
    judge = Judge(Budget.parse("auc>=99%"), scores, labels)
    # Without the only positive sample there is no AUC.
    assert CautiousJudge(judge).used(scores) == 0


def test_the_worst_of_many_samples_is_expected_to_be_worse() -> None:
    random = np.random.default_rng(3)
    reference = {"y": np.zeros((1000, 1))}
    errors = random.exponential(size=(4000, 1))
    text = "max_abs<=20"
    seen = {"y": errors[:1000]}
    used = CautiousJudge(Judge(Budget.parse(text), reference)).used(seen)
    # Of ten times as many the largest is log 10 further out on average, and log 100 one time in ten.
    assert errors[:1000].max() + math.log(100) * 0.6 < used * 20 < errors[:1000].max() + math.log(100) * 3
    assert Judge(Budget.parse(text), reference).judge(seen).used == pytest.approx(errors[:1000].max() / 20)
    constant = {"y": np.full((1000, 1), 0.5)}
    assert CautiousJudge(Judge(Budget.parse(text), reference)).used(constant) == 0.5 / 20


def test_the_least_similar_sample_is_extrapolated_downwards() -> None:
    random = np.random.default_rng(4)
    reference = {"y": random.normal(size=(500, 8))}
    candidate = {"y": reference["y"] + 0.3 * random.normal(size=(500, 8))}
    judge = Judge(Budget.parse("cosine.min>=0.1"), reference)
    assert 1 > CautiousJudge(judge).used(candidate) > judge.judge(candidate).used > 0


@pytest.mark.parametrize("text", ["rel_spread.max<=0.5", "max_abs<=0.5", "cosine.min>=0.5", "rel_l2<=0.1"])
def test_the_first_samples_never_use_up_more_than_all(text: str) -> None:
    random = np.random.default_rng(3)
    reference = {"y": random.normal(size=(200, 5)).astype(np.float32)}
    noisy = reference["y"] + random.standard_t(2, size=(200, 5)).astype(np.float32) * np.float32(0.1)
    cautious = CautiousJudge(Judge(Budget.parse(text), reference))
    all_used = cautious.used({"y": noisy})
    few = [cautious.worst_of_some({"y": noisy[:count]}) for count in (1, 16, 100, 200)]
    assert few == sorted(few)
    assert few[-1] <= all_used
    assert (few[-1] > 0) == (text != "rel_l2<=0.1")


def test_doubt_counts_groups_and_not_their_samples() -> None:
    random = np.random.default_rng(2)
    moved = np.abs(random.normal(0.01, 0.003, 9)).repeat(11)[:96]
    reference = {"y": np.zeros((96, 1))}
    judge = Judge(Budget.parse("max_abs<=0.05"), reference)
    candidate = {"y": moved[:, None] + random.normal(0, 1e-5, (96, 1))}
    alone = CautiousJudge(judge).used(candidate)
    grouped = CautiousJudge(judge, groups=np.arange(96) // 11).used(candidate)
    assert judge.judge(candidate).used < alone < 0.7 * grouped
    # Two groups show how far apart they are; samples of their own are what they were.
    assert CautiousJudge(judge, groups=np.arange(96) // 48).used(candidate) > judge.judge(candidate).used
    assert CautiousJudge(judge, groups=np.arange(96)).used(candidate) == pytest.approx(alone)


def test_flips_of_one_group_are_one_flip() -> None:
    answers = REFERENCE["y"].argmax(axis=1)
    groups = np.arange(COUNT) // 10
    # Whole groups turn wrong, and as many turn right.
    answers = answers.copy()
    for group in range(0, 40, 2):
        rows = groups == group
        answers[rows] = LABELS[rows] if group % 4 else (LABELS[rows] + 2) % 4
    judge = Judge(Budget.parse("accuracy>=99%"), REFERENCE, LABELS)
    candidate = {"y": np.eye(4, dtype=np.float32)[answers]}
    assert CautiousJudge(judge, groups=groups).used(candidate) > 1.4 * CautiousJudge(judge).used(candidate)
