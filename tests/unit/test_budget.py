"""The budget language means what it says, and what it cannot mean is refused with a sentence."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from vernier.accuracy import task_metric
from vernier.budget import Budget, Judge
from vernier.errors import AccuracyError, BuildError

RANDOM = np.random.default_rng(1)
LABELS = RANDOM.integers(0, 2, 400)
REFERENCE = {"score": (RANDOM.normal(size=(400, 1)) + LABELS[:, None]).astype(np.float32)}


def off_by(error: float, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    score = REFERENCE["score"].copy()
    score[rows] += error
    return {"score": score}


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("auc>=99%", ["auc>=99%"]),
        (" auc >= 99.9 % ; max_abs<=0.05,", ["auc>=99.9%", "max_abs<=0.05"]),
        ("rel_l2.p99.9<=2e-2", ["rel_l2.p99.9<=0.02"]),
        ("top1>=99%", ["top1>=0.99"]),
        ("max_abs.max@model/out:0<=.5", ["max_abs.max@model/out:0<=0.5"]),
        ("pkg.sub:ndcg>=99%", ["pkg.sub:ndcg>=99%"]),
        ("log_loss<=101%", ["log_loss<=101%"]),
        ("accuracy>=0.9", ["accuracy>=0.9"]),
    ],
)
def test_a_budget_reads_back_as_written(text: str, texts: list[str]) -> None:
    budget = Budget.parse(text)
    assert budget.texts == texts
    assert Budget.parse(",".join(texts)) == budget


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (",;", "empty"),
        ("auc", "no budget"),
        ("auc>99%", "no budget"),
        ("auc>=", "no budget"),
        ("max_abs<=-1", "no budget"),
        ("max_abs<=nan", "no budget"),
        ("acuracy>=99%", "no metric"),
        ("top0>=99%", "no metric"),
        ("auc<=0.9", "worse model"),
        ("max_abs>=0.05", "worse model"),
        ("max_abs<=5%", "takes no percentage: write max_abs<=0.05, or .*rel_l2.max<=5%"),
        ("max_abs.p99@y<=5%", "takes no percentage"),
        ("cosine<=0.9", "worse model"),
        ("log_loss>=0.2", "worse model"),
        ("auc>=101%", "does not reach"),
        ("auc<=101%", "does not reach"),
        ("log_loss<=99%", "does not reach"),
        ("top1>=1.5", "never hold"),
        ("auc.p99>=99%", "single samples"),
        ("rel_l2.p999<=1", "single samples"),
        ("rel_l2.median<=1", "single samples"),
    ],
)
def test_what_is_no_budget_is_refused_with_a_sentence(text: str, says: str) -> None:
    with pytest.raises(BuildError, match=says):
        Budget.parse(text)


def test_a_share_is_of_fp32s_own_metric() -> None:
    reference = task_metric("auc", REFERENCE, LABELS)
    noisy = {"score": REFERENCE["score"] + RANDOM.normal(size=(400, 1)).astype(np.float32)}
    reached = task_metric("auc", noisy, LABELS) / reference
    assert 0.8 < reached < 0.97
    for share, passes in ((reached * 100 - 0.01, True), (reached * 100 + 0.01, False)):
        verdict = Budget.parse(f"auc>={share:.6f}%").judge(REFERENCE, noisy, LABELS)
        assert verdict.passed is passes
        assert verdict.findings[0].reference == reference
        assert (verdict.used <= 1) is passes
    assert "FP32: " in verdict.reason


def test_99_percent_of_a_loss_is_at_most_101_percent_of_it() -> None:
    for text in ("log_loss>=99%", "log_loss<=101%"):
        finding = Budget.parse(text).judge(REFERENCE, REFERENCE, LABELS).findings[0]
        assert finding.limit == pytest.approx(1.01 * task_metric("log_loss", REFERENCE, LABELS))
        assert not Budget.parse(text).judge(REFERENCE, off_by(0.5), LABELS).passed


def test_99_percent_of_an_error_rate_is_of_the_tokens_that_are_right() -> None:
    tokens = RANDOM.integers(1, 6, (50, 10))
    answers = tokens.copy()
    answers[:25, 0] = 7
    finding = Budget.parse("wer>=99%").judge({"t": answers}, {"t": answers}, tokens).findings[0]
    assert finding.reference == pytest.approx(0.05)
    assert finding.limit == pytest.approx(1 - 0.99 * 0.95)
    assert finding.passed


def test_distances_bound_the_whole_set_or_a_statistic_of_its_samples() -> None:
    one_broken = off_by(3.0, slice(5, 6))
    assert Budget.parse("rel_l2<=0.15").judge(REFERENCE, one_broken).passed
    assert Budget.parse("max_abs.p99<=0.01").judge(REFERENCE, one_broken).passed
    assert not Budget.parse("max_abs.max<=2.9").judge(REFERENCE, one_broken).passed
    assert not Budget.parse("max_abs<=2.9").judge(REFERENCE, one_broken).passed
    assert not Budget.parse("rel_l2<=0.15,max_abs<=2.9").judge(REFERENCE, one_broken).passed


def test_a_value_at_its_limit_passes_and_uses_all_of_it() -> None:
    reference = {"y": np.zeros((4, 1))}
    verdict = Budget.parse("max_abs<=0.25").judge(reference, {"y": np.full((4, 1), 0.25)})
    assert verdict.passed
    assert verdict.used == 1
    half = Budget.parse("max_abs<=0.25").judge(reference, {"y": np.full((4, 1), 0.125)})
    assert half.used == 0.5
    nothing_allowed = Budget.parse("max_abs<=0").judge(reference, {"y": np.full((4, 1), 0.1)})
    assert nothing_allowed.used == math.inf
    assert Budget.parse("max_abs<=0").judge(reference, reference).used == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "text", ["auc>=1%", "max_abs<=1e30", "rel_l2.p50<=9", "cosine>=0", "tests.unit.test_budget:always_one>=0"]
)
def test_a_non_finite_answer_fails_every_budget(text: str, bad: float) -> None:
    broken = off_by(0.0)
    broken["score"][3] = bad
    verdict = Budget.parse(text).judge(REFERENCE, broken, LABELS)
    assert not verdict.passed
    assert "NaN or an infinity" in verdict.reason
    assert verdict.used == math.inf


def test_a_term_without_output_holds_for_each_output_it_applies_to() -> None:
    reference = {"a": np.ones((5, 3)), "b": np.ones((5, 3)), "class": np.arange(5)}
    candidate = {"a": np.ones((5, 3)), "b": np.ones((5, 3)) + 0.5, "class": np.arange(5) + 3}
    assert Budget.parse("max_abs<=0.4").judge(reference, candidate).findings[0].value == 0.5
    assert Budget.parse("max_abs@a<=0.4").judge(reference, candidate).passed
    assert not Budget.parse("max_abs@class<=0.4").judge(reference, candidate).passed
    assert not Budget.parse("equal>=50%").judge(reference, candidate).passed
    with pytest.raises(BuildError, match="names the output 'c'"):
        Budget.parse("max_abs@c<=0.4").judge(reference, candidate)
    with pytest.raises(BuildError, match="applies to no output"):
        Budget.parse("top1>=99%").judge(REFERENCE, REFERENCE)


def test_labels_are_asked_for_where_a_term_needs_them() -> None:
    with pytest.raises(BuildError, match="needs labels"):
        Budget.parse("auc>=99%").judge(REFERENCE, REFERENCE)
    with pytest.raises(AccuracyError, match="nothing to compare"):
        Budget.parse("max_abs<=1").judge({"y": np.zeros((0, 2))}, {"y": np.zeros((0, 2))})
    with pytest.raises(AccuracyError, match="no output 'score'"):
        Budget.parse("max_abs<=1").judge(REFERENCE, {})


def always_one(outputs: dict[str, np.ndarray], labels: np.ndarray | None) -> float:
    return 1.0


def test_a_custom_metric_is_any_function_of_outputs_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "budget_metrics.py").write_text(
        "def worst(outputs, labels):\n    return -abs(outputs['score']).max()\n"
        "def text(outputs, labels):\n    return 'good'\n"
    )
    monkeypatch.chdir(tmp_path)
    limit = float(np.abs(REFERENCE["score"]).max())
    assert Budget.parse("budget_metrics:worst<=0").judge(REFERENCE, REFERENCE).passed
    assert not Budget.parse("budget_metrics:worst>=0").judge(REFERENCE, REFERENCE).passed
    finding = Budget.parse("budget_metrics:worst<=0").judge(REFERENCE, off_by(0.0)).findings[0]
    assert finding.value == finding.reference == -limit
    with pytest.raises(BuildError, match="absolute bound"):
        Budget.parse("budget_metrics:worst>=99%").judge(REFERENCE, REFERENCE)
    with pytest.raises(BuildError, match="return one number"):
        Budget.parse("budget_metrics:text>=1").judge(REFERENCE, REFERENCE)
    for missing in ("budget_metrics:nothing", "no_such_module_here:f"):
        with pytest.raises(BuildError, match="cannot load the metric"):
            Budget.parse(f"{missing}>=1").judge(REFERENCE, REFERENCE)


def test_limits_carry_what_can_be_judged_without_labels() -> None:
    budget = Budget.parse("auc>=99%,max_abs.max<=0.05,top1.p1@score>=0.5")
    assert budget.limits() == {"max_abs.max": 0.05, "top1.p1@score": 0.5}
    assert Budget.from_limits(budget.limits()).terms == budget.terms[1:]


def test_one_judge_judges_many_candidates_of_one_reference() -> None:
    judge = Judge(Budget.parse("auc>=99%,max_abs<=0.05"), REFERENCE, LABELS)
    assert judge.judge(REFERENCE).passed
    assert not judge.judge(off_by(0.06)).passed
    assert judge.judge(off_by(0.04)).used == pytest.approx(0.8, rel=1e-3)
