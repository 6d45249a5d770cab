"""Distances and similarities equal SciPy's and scikit-learn's, and nothing broken or empty ever passes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import cosine as scipy_cosine
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score

from vernier.accuracy import (
    DISTANCES,
    SIMILARITIES,
    Comparison,
    compare_outputs,
    per_sample,
    spread_of,
    statistic_of,
)
from vernier.errors import AccuracyError

METRICS = (*DISTANCES, *SIMILARITIES, "top1", "top3")


def pair(
    seed: int = 0, shape: tuple[int, ...] = (40, 7), noise: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    reference = random.normal(size=shape).astype(np.float32)
    return reference, (reference + noise * random.normal(size=shape)).astype(np.float32)


def test_distances_are_those_of_their_formulas() -> None:
    r, c = pair()
    error = c.astype(np.float64) - r
    np.testing.assert_allclose(
        per_sample("rel_l2", r, c),
        np.linalg.norm(error, axis=1) / np.linalg.norm(r.astype(np.float64), axis=1),
    )
    np.testing.assert_allclose(per_sample("max_abs", r, c), np.abs(error).max(axis=1))
    whole = Comparison(r, c)
    assert whole.value("rel_l2") == pytest.approx(
        np.linalg.norm(error) / np.linalg.norm(r.astype(np.float64))
    )
    assert whole.value("max_abs") == np.abs(error).max()


def test_cosine_is_scipys() -> None:
    r, c = pair()
    expected = [
        1 - scipy_cosine(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(r, c, strict=True)
    ]
    np.testing.assert_allclose(per_sample("cosine", r, c), expected)


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "with ties"])
def test_kendall_is_scipys_tau_b(rounded: bool) -> None:
    r, c = pair(shape=(60, 23), noise=1.0)
    if rounded:
        r, c = np.round(r), np.round(c)
    expected = [kendalltau(a, b).statistic for a, b in zip(r, c, strict=True)]
    np.testing.assert_allclose(per_sample("kendall", r, c), expected, atol=1e-12)


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "with ties"])
def test_ndcg_is_scikit_learns(rounded: bool) -> None:
    r, c = pair(shape=(60, 23), noise=1.0)
    if rounded:
        r, c = np.round(r), np.round(c)
    r = r - r.min()
    expected = [ndcg_score(a[None].astype(float), b[None].astype(float)) for a, b in zip(r, c, strict=True)]
    np.testing.assert_allclose(per_sample("ndcg", r, c), expected)


def test_rank_agreement_of_single_scores_is_over_the_samples() -> None:
    r, c = pair(shape=(200, 1))
    assert Comparison(r, c).value("kendall") == pytest.approx(kendalltau(r, c).statistic)
    assert compare_outputs(r, c)["kendall"] == pytest.approx(kendalltau(r, c).statistic)
    with pytest.raises(AccuracyError, match="without a statistic"):
        per_sample("kendall", r, c)


def test_top_agreement_counts_the_candidates_best_among_the_references_best() -> None:
    r = np.array([[5.0, 4.0, 3.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert per_sample("top1", r, np.array([[9.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])).tolist() == [
        1.0,
        1.0,
    ]
    assert per_sample("top2", r, np.array([[9.0, 1.0, 2.0, 0.0], [0.0, 0.0, 1.0, 2.0]])).tolist() == [
        0.5,
        0.0,
    ]


def test_a_candidate_that_cannot_decide_gets_no_credit_for_the_order_of_its_ties() -> None:
    r = np.array([[5.0, 4.0, 3.0]])
    assert per_sample("top1", r, np.zeros((1, 3))).tolist() == [0.0]


def test_top_agreement_works_along_the_last_axis_of_sequences() -> None:
    r = np.zeros((1, 4, 3))
    r[0, :, 1] = 1
    c = r.copy()
    c[0, 3] = [2, 1, 0]
    assert per_sample("top1", r, c).tolist() == [0.75]


def test_a_top_of_everything_is_refused_since_it_always_agrees() -> None:
    with pytest.raises(AccuracyError, match="always agrees"):
        per_sample("top7", *pair())


def test_rel_spread_is_the_error_over_the_distance_between_answers() -> None:
    random = np.random.default_rng(0)
    r = 1000 + random.normal(size=(500, 1))
    assert spread_of(r) == pytest.approx(r.std())
    # Relative to the magnitude a wrong answer looks right; relative to the spread it does not.
    broken = r.copy()
    broken[3] += 1.0
    assert per_sample("rel_l2", r, broken)[3] < 0.002
    assert per_sample("rel_spread", r, broken)[3] == pytest.approx(1 / r.std())
    assert per_sample("rel_spread", r[3:4], broken[3:4], spread=2.0).tolist() == pytest.approx([0.5])


def test_equal_outputs_are_equal_in_every_metric() -> None:
    r, _ = pair()
    for metric in METRICS:
        expected = 0.0 if metric in DISTANCES else 1.0
        np.testing.assert_allclose(per_sample(metric, r, r), expected, atol=1e-12, err_msg=metric)
        for degenerate in (np.zeros((3, 7)), np.ones((3, 7))):
            np.testing.assert_allclose(per_sample(metric, degenerate, degenerate), expected, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["candidate", "reference", "both"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_non_finite_value_is_the_worst_there_is(metric: str, where: str, bad: float) -> None:
    r, c = pair()
    if where != "reference":
        c[11, 3] = bad
    if where != "candidate":
        r[11, 3] = bad
    worst = np.inf if metric in DISTANCES else -np.inf
    comparison = Comparison(r, c)
    values = comparison.per_sample(metric)
    assert values[11] == worst
    assert np.isfinite(np.delete(values, 11)).all()
    assert comparison.value(metric) == worst
    assert comparison.value(metric, "max" if metric in DISTANCES else "min") == worst
    assert compare_outputs(r, c)["non_finite"] == 1


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_comparing_nothing_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(AccuracyError, match="nothing to compare"):
        compare_outputs(np.zeros(shape), np.zeros(shape))
    with pytest.raises(AccuracyError, match="nothing to compare"):
        per_sample("rel_l2", np.zeros(shape), np.zeros(shape))
    with pytest.raises(AccuracyError, match="nothing to compare"):
        statistic_of(np.zeros(0), "p99")


def test_different_shapes_and_types_without_numbers_are_errors() -> None:
    with pytest.raises(AccuracyError, match=r"\[2, 3\]"):
        compare_outputs(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(AccuracyError, match="cannot be compared"):
        compare_outputs(np.array(["a"]), np.array(["a"]))
    with pytest.raises(AccuracyError, match="no metric"):
        per_sample("accuracy", *pair())


def test_a_percentile_is_a_value_that_occurs_and_errs_towards_the_worse() -> None:
    values = np.arange(101.0)
    np.random.default_rng(0).shuffle(values)
    assert statistic_of(values, "p99") == 99
    assert statistic_of(values[values < 100], "p99") == 99
    assert statistic_of(values, "p99.5") == 100
    assert statistic_of(values, "p1") == 1
    assert statistic_of(values, "p0.5") == 0
    assert (statistic_of(values, "min"), statistic_of(values, "max"), statistic_of(values, "mean")) == (
        0,
        100,
        50,
    )
    with pytest.raises(AccuracyError, match="no statistic"):
        statistic_of(values, "median")


def test_one_broken_answer_among_thousands_shows_in_the_worst_sample() -> None:
    r, c = pair(shape=(5000, 4), noise=0.001)
    c[17] = -r[17]
    found = compare_outputs(r, c)
    assert found["rel_l2"] < 0.05
    assert found["rel_l2.p99"] < 0.02
    assert found["rel_l2.max"] == pytest.approx(2.0)


def test_large_outputs_in_pieces_give_what_the_whole_gives() -> None:
    r, c = pair(shape=(9, 1 << 18))
    error = c.astype(np.float64) - r
    assert Comparison(r, c).value("rel_l2") == pytest.approx(
        math.sqrt((error**2).sum() / (r.astype(np.float64) ** 2).sum())
    )
    centred = r.astype(np.float64) - r.astype(np.float64).mean(axis=0)
    assert spread_of(r) == pytest.approx(math.sqrt((centred**2).sum(axis=1).mean()))


def test_scalars_class_numbers_and_flags_can_be_compared() -> None:
    assert compare_outputs(np.float32(2), np.float32(3))["max_abs"] == 1
    assert compare_outputs(np.array([1, 2, 3]), np.array([1, 2, 4]))["equal"] == pytest.approx(2 / 3)
    assert compare_outputs(np.array([True, False]), np.array([True, True]))["equal"] == 0.5
