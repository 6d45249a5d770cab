"""The expected share of flipped decisions is what a large sample shows, also where a small one shows none."""

from __future__ import annotations

import numpy as np
import pytest

from vernier.accuracy import decisions, find_task, flip_rate


def noisy(count: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, count)
    logits = random.normal(size=(count, 5)) + 4 * np.eye(5)[labels]
    return logits, logits + noise * random.normal(size=logits.shape), labels


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_a_few_hundred_samples_estimate_the_rate_of_many(form: str) -> None:
    many = noisy(200_000, 0.2)
    observed = float((many[0].argmax(axis=1) != many[1].argmax(axis=1)).mean())
    assert 0.001 < observed < 0.01
    few = noisy(500, 0.2, seed=1)
    if form == "probabilities":
        few = tuple(np.exp(a) / np.exp(a).sum(axis=1, keepdims=True) for a in few[:2]) + few[2:]
    task = find_task({"y": few[0]}, few[2])
    assert flip_rate(task, few[0], few[1], few[2]) == pytest.approx(observed, rel=0.6)


def test_no_change_flips_nothing_and_without_margins_half_flips() -> None:
    logits, _, labels = noisy(100, 0.0)
    task = find_task({"y": logits}, labels)
    assert flip_rate(task, logits, logits, labels) == 0
    assert flip_rate(task, np.zeros_like(logits), logits, labels) == pytest.approx(0.5, abs=0.3)


def test_a_single_score_decides_at_its_threshold() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 50_000)
    scores = random.normal(size=50_000) + 2 * labels - 1
    moved = scores + 0.1 * random.normal(size=scores.size)
    task = find_task({"y": scores}, labels, "accuracy")
    observed = float(((scores > 0) != (moved > 0)).mean())
    assert flip_rate(task, scores, moved, labels) == pytest.approx(observed, rel=0.15)
    probabilities = [1 / (1 + np.exp(-a)) for a in (scores, moved)]
    task = find_task({"y": probabilities[0]}, labels, "accuracy")
    assert flip_rate(task, *probabilities, labels) == pytest.approx(observed, rel=0.15)


def test_padding_is_no_decision() -> None:
    logits = np.zeros((4, 6, 3))
    logits[..., 0] = 1.0
    labels = np.zeros((4, 6), int)
    labels[:, 3:] = -1
    moved = logits.copy()
    moved[:, 3:, 1] = 9.0
    task = find_task({"y": logits}, labels)
    assert flip_rate(task, logits, moved, labels) == 0
    assert decisions(task, labels) == 12


def test_what_is_no_decision_has_no_rate() -> None:
    scores, labels = np.random.default_rng(0).normal(size=(50, 1)), np.arange(50) % 2
    assert flip_rate(find_task({"y": scores}, labels), scores, scores, labels) is None
    classes = np.arange(50) % 3
    assert flip_rate(find_task({"y": classes}, classes), classes, classes, classes) is None
    logits, moved, labels = noisy(20, 0.1)
    moved[3, 1] = np.nan
    assert flip_rate(find_task({"y": logits}, labels), logits, moved, labels) is None
