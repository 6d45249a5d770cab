"""What must hold of accuracy for any numbers at all."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score

from vernier.accuracy import DISTANCES, SIMILARITIES, Comparison, edit_distance, statistic_of
from vernier.budget import Budget, Judge
from vernier.builder.searching.caution import CautiousJudge

METRICS = (*DISTANCES, *SIMILARITIES, "top1")
FINITE = st.floats(-1e6, 1e6, width=32)
SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 9))
#: Few different values make many ties.
SMALL = st.integers(-2, 2).map(float)


def pairs(values: st.SearchStrategy[float] = FINITE) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    def two(shape: tuple[int, int]) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
        array = hnp.arrays(np.float32, shape, elements=values)
        return st.tuples(array, array)

    return SHAPES.flatmap(two)


@given(pairs(), st.sampled_from(METRICS))
def test_an_answer_equal_to_the_reference_is_perfect(pair, metric) -> None:
    perfect = 0.0 if metric in DISTANCES else 1.0
    np.testing.assert_allclose(Comparison(pair[0], pair[0]).per_sample(metric), perfect, atol=1e-9)


@given(pairs(st.one_of(FINITE, SMALL)), st.sampled_from(METRICS))
def test_metrics_stay_in_their_range(pair, metric) -> None:
    values = Comparison(*pair).per_sample(metric)
    assert not np.isnan(values).any()
    if metric in DISTANCES:
        assert (values >= 0).all()
    else:
        assert (values <= 1 + 1e-9).all()
        assert (values >= -1 - 1e-9).all()


@given(pairs(), st.sampled_from([m for m in METRICS if m != "rel_spread"]), st.randoms())
def test_a_samples_value_does_not_depend_on_its_neighbours(pair, metric, random) -> None:
    order = list(range(len(pair[0])))
    random.shuffle(order)
    whole = Comparison(*pair).per_sample(metric)
    shuffled = Comparison(pair[0][order], pair[1][order]).per_sample(metric)
    np.testing.assert_allclose(shuffled, whole[order])


@given(pairs(), st.sampled_from(METRICS), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_no_budget_passes_an_answer_that_is_not_finite(pair, metric, bad, data) -> None:
    reference, candidate = pair
    row = data.draw(st.integers(0, len(candidate) - 1))
    candidate[row, data.draw(st.integers(0, candidate.shape[1] - 1))] = bad
    text = f"{metric}<=1e30" if metric in DISTANCES else f"{metric}>=0"
    verdict = Budget.parse(text).judge({"y": reference}, {"y": candidate})
    assert not verdict.passed
    assert verdict.used == math.inf


@given(pairs(SMALL))
@settings(deadline=None)
def test_rank_agreement_is_scipys_and_scikit_learns_whatever_the_ties(pair) -> None:
    reference, candidate = pair
    found = Comparison(reference, candidate)
    for index, (r, c) in enumerate(zip(reference, candidate, strict=True)):
        expected = kendalltau(r, c).statistic if np.ptp(r) and np.ptp(c) else float(np.ptp(r) == np.ptp(c))
        np.testing.assert_allclose(found.per_sample("kendall")[index], expected, atol=1e-12)
        gains = (r - min(r.min(), 0)).astype(float)
        expected = ndcg_score(gains[None], c[None].astype(float)) if gains.any() else 1.0
        np.testing.assert_allclose(found.per_sample("ndcg")[index], expected)


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_edit_distance_is_the_textbooks(a: list[int], b: list[int]) -> None:
    table = [[i + j if not i * j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            )
    assert edit_distance(a, b) == table[-1][-1]


@given(
    hnp.arrays(np.float64, st.integers(1, 300), elements=FINITE),
    st.floats(50, 99.9).map(lambda p: round(p, 1)),
)
def test_a_high_percentile_is_a_value_that_enough_samples_do_not_pass(
    values: np.ndarray, percent: float
) -> None:
    found = statistic_of(values, f"p{percent:g}")
    assert found in values
    assert (values <= found).mean() >= percent / 100 - 1e-9


@given(
    pairs(st.floats(-10, 10, width=32)),
    st.floats(0.01, 5),
    st.sampled_from(["max_abs", "rel_spread.max", "rel_l2.p99"]),
)
def test_used_says_passed_and_grows_with_the_error(pair, limit, metric) -> None:
    reference, candidate = ({"y": array.astype(np.float64)} for array in pair)
    halfway = {"y": (reference["y"] + candidate["y"]) / 2}
    budget = Budget.parse(f"{metric}<={limit}")
    whole, half = (budget.judge(reference, c) for c in (candidate, halfway))
    assert whole.passed == (whole.used <= 1)
    assert half.used <= whole.used + 1e-9


@given(
    pairs(st.floats(-10, 10, width=32)), st.sampled_from(["max_abs<=3", "cosine.min>=0.2", "rel_l2.p50<=1"])
)
def test_caution_never_makes_a_variant_look_better(pair, text) -> None:
    judge = Judge(Budget.parse(text), {"y": pair[0]})
    assert CautiousJudge(judge).used({"y": pair[1]}) >= judge.judge({"y": pair[1]}).used
