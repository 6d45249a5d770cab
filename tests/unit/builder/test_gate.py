"""The gate: the default demands what is right for labels and outputs, and one broken answer is seen."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vernier.budget import Budget
from vernier.builder.searching.gate import (
    check_reference,
    default_budget,
    gate,
    overview,
    resolve_budget,
    worst_samples,
)
from vernier.errors import BuildError

RANDOM = np.random.default_rng(2)
SAMPLES = 2000
CLASSES = RANDOM.integers(0, 6, SAMPLES)
LOGITS = (RANDOM.normal(size=(SAMPLES, 6)) + 6 * np.eye(6)[CLASSES]).astype(np.float32)
SOFTMAX = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)


def test_labels_of_classes_demand_accuracy_and_a_bound_on_single_answers() -> None:
    assert default_budget({"logits": LOGITS}, CLASSES).texts == [
        "accuracy@logits>=99%",
        "rel_spread.max@logits<=0.5",
    ]
    assert default_budget({"p": SOFTMAX}, CLASSES, strict=True).texts == [
        "accuracy@p>=99.9%",
        "rel_spread.max@p<=0.25",
        "max_abs@p<=0.1",
    ]


def test_binary_labels_demand_auc_of_the_output_that_they_fit() -> None:
    labels = RANDOM.integers(0, 2, SAMPLES)
    budget = default_budget({"embedding": LOGITS, "score": SOFTMAX[:, :1]}, labels)
    assert budget.texts[0] == "auc@score>=99%"
    assert "rel_spread.max@embedding<=0.5" in budget.texts


def test_without_labels_a_quantile_and_the_worst_sample_are_bounded() -> None:
    assert default_budget({"p": SOFTMAX}, None).texts == [
        "rel_spread.p99@p<=0.1",
        "rel_spread.max@p<=0.2",
        "max_abs@p<=0.1",
    ]
    assert default_budget({"class": CLASSES}, None).texts == ["equal@class>=0.99"]


def test_an_output_may_have_any_name() -> None:
    reference = {"a, b;c<=1@d": SOFTMAX}
    budget = default_budget(reference, CLASSES)
    assert gate(reference, reference, CLASSES, budget).passed
    assert Budget.from_limits(budget.limits()).judge(reference, reference).passed


def test_labels_that_fit_no_output_stop_the_build() -> None:
    with pytest.raises(BuildError, match="fit no output"):
        default_budget({"p": SOFTMAX}, CLASSES[:5])


@pytest.mark.parametrize("labels", [None, CLASSES], ids=["without labels", "with labels"])
def test_one_broken_answer_among_thousands_is_refused(labels: np.ndarray | None) -> None:
    for reference in ({"logits": LOGITS}, {"p": SOFTMAX}):
        (name, array), *_ = reference.items()
        budget = default_budget(reference, labels)
        broken = array + RANDOM.normal(size=array.shape).astype(np.float32) * 0.001
        assert gate(reference, {name: broken}, labels, budget).passed
        broken[77] = broken[77][::-1]
        result = gate(reference, {name: broken}, labels, budget, "onnxruntime")
        assert not result.passed
        assert result.reason.startswith("on onnxruntime: ")


def test_a_task_metric_alone_would_not_have_seen_it() -> None:
    broken = SOFTMAX.copy()
    broken[77] = broken[77][::-1]
    assert gate({"p": SOFTMAX}, {"p": broken}, CLASSES, Budget.parse("accuracy>=99%")).passed
    budget = resolve_budget("accuracy>=99%", {"p": SOFTMAX}, CLASSES)
    assert not gate({"p": SOFTMAX}, {"p": broken}, CLASSES, budget).passed


def test_a_budget_that_bounds_single_answers_is_left_as_it_is() -> None:
    for text in ("accuracy>=99%,max_abs<=0.9", "rel_l2.p99<=0.02"):
        assert resolve_budget(text, {"p": SOFTMAX}, CLASSES) == Budget.parse(text)
    assert len(resolve_budget("rel_l2<=0.02", {"p": SOFTMAX}, None).terms) == 3
    assert resolve_budget(None, {"p": SOFTMAX}, None, strict=True) == default_budget(
        {"p": SOFTMAX}, None, True
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_is_itself_not_finite_can_judge_nothing(bad: float) -> None:
    broken = LOGITS.copy()
    broken[3, 1] = bad
    with pytest.raises(BuildError, match="1 of 2000 samples"):
        gate({"logits": broken}, {"logits": broken}, None, Budget.parse("max_abs<=1"))
    with pytest.raises(BuildError, match="nothing to compare"):
        check_reference({}, 0)
    with pytest.raises(BuildError, match="nothing to compare"):
        gate({"y": LOGITS[:0]}, {"y": LOGITS[:0]}, None, Budget.parse("max_abs<=1"))


def test_a_non_finite_answer_is_refused_and_the_result_is_still_json() -> None:
    broken = LOGITS.copy()
    broken[3, 1] = np.nan
    result = gate(
        {"logits": LOGITS}, {"logits": broken}, CLASSES, default_budget({"logits": LOGITS}, CLASSES)
    )
    assert not result.passed
    assert result.metrics["non_finite"] == 1
    assert type(result).model_validate(json.loads(result.model_dump_json())) == result


def test_metrics_of_several_outputs_name_their_output() -> None:
    found = overview({"a": LOGITS, "b": SOFTMAX}, {"a": LOGITS + 1, "b": SOFTMAX})
    assert found["max_abs@a"] == pytest.approx(1, abs=1e-5)
    assert found["max_abs@b"] == 0
    assert "max_abs" in overview({"a": LOGITS}, {"a": LOGITS})


def test_the_worst_samples_are_those_that_moved_farthest() -> None:
    moved = {"p": SOFTMAX.copy(), "class": CLASSES.copy()}
    moved["p"][5] = moved["p"][5][::-1]
    moved["p"][9] += 0.1
    assert worst_samples({"p": SOFTMAX, "class": CLASSES}, moved, 2) == [5, 9]
