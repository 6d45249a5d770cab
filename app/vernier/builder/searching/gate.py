"""The accuracy gate: what a variant must keep, and whether it did.

With labels the default is MLPerf's rule, 99 % of FP32's task metric (strict: 99.9 %). A task metric is an
average, and an average forgives one answer that is plainly wrong if a thousand others are right. So a
sanity bound stands beside it: no single answer may move by more than half of the distance at which FP32's
answers lie from one another (`rel_spread`, see vernier.accuracy), no probability by more than a quarter. It
is wide enough that honest rounding never meets it, and narrow enough that an answer outside it is another
answer. Whoever bounds single answers in the budget has replaced it by a choice of their own.

Without labels nothing says what an error costs, so 99 % of the answers must stay within a tenth of that
distance and all within a fifth; strict takes a fifth of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vernier.accuracy import Comparison, find_task, holds_probabilities, is_divergence
from vernier.budget import Budget, Judge, Verdict, parse_term
from vernier.errors import AccuracyError, BuildError
from vernier.package.manifest import GateResult
from vernier.tensors import Array, Arrays

#: (ordinary, strict)
_TASK_SHARE = ("99%", "99.9%")
_SANE_SPREAD, _SANE_PROBABILITY = ("0.5", "0.25"), ("0.25", "0.1")
_QUANTILE_SPREAD, _WORST_SPREAD, _WORST_PROBABILITY = ("0.1", "0.02"), ("0.2", "0.04"), ("0.1", "0.02")
_EQUAL = ("99%", "99.9%")


def check_reference(reference: Mapping[str, Array], samples: int) -> None:
    """Raises BuildError when FP32 itself gives no usable answer; nothing could be judged by it."""
    if not samples or not reference:
        raise BuildError("there is nothing to compare: give evaluation or calibration data")
    for name, array in reference.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
            raise BuildError(
                f"the FP32 model itself answers NaN or infinity in output '{name}' for {len(bad)} of {len(array)} "
                f"samples (the first is {bad[0]}): mend the model or remove those samples"
            )


def default_budget(reference: Mapping[str, Array], labels: Array | None, strict: bool = False) -> Budget:
    """What must hold when nobody says anything; every output and metric named.

    Raises:
        BuildError: there are labels, and they fit no output.
    """
    if labels is None:
        return _budget(_divergence_terms(reference, strict))
    try:
        task = find_task(reference, labels)
    except AccuracyError as error:
        raise BuildError(error.message) from error
    share = f"{task.metric}@{task.output}>={_TASK_SHARE[strict]}"
    return _budget([share, *_sanity_terms(reference, strict)])


def sanity_budget(reference: Mapping[str, Array], strict: bool = False) -> Budget:
    """No answer may have become another one; see the module's first paragraph."""
    return _budget(_sanity_terms(reference, strict))


def resolve_budget(
    text: str | None, reference: Mapping[str, Array], labels: Array | None, strict: bool = False
) -> Budget:
    """The budget of `--budget`, with the sanity bound where it speaks of averages only; else the default.

    Args:
        reference: FP32's outputs on the evaluation data.
    """
    if text is None:
        return default_budget(reference, labels, strict)
    budget = Budget.parse(text)
    if budget.bounds_samples:
        return budget
    return Budget(budget.terms + sanity_budget(reference, strict).terms)


def ranking_budget(budget: Budget, reference: Mapping[str, Array]) -> Budget:
    """The part of `budget` that needs no labels, or the sanity bound: what orders nodes by their harm."""
    distances = tuple(term for term in budget.terms if is_divergence(term.metric))
    return Budget(distances) if distances else sanity_budget(reference)


def make_judge(budget: Budget, reference: Arrays, labels: Array | None) -> Judge:
    """A judge over sound FP32 outputs. Raises BuildError when budget, outputs and labels do not fit."""
    check_reference(reference, len(next(iter(reference.values()))) if reference else 0)
    try:
        return Judge(budget, reference, labels)
    except AccuracyError as error:
        raise BuildError(error.message) from error


def gate(
    reference: Arrays, candidate: Arrays, labels: Array | None, budget: Budget, runtime: str = ""
) -> GateResult:
    """Judges one variant by its outputs on the evaluation data.

    Args:
        runtime: where the candidate's outputs come from, for the refusal's sentence.

    Raises:
        BuildError: the outputs cannot be compared at all; a variant that strays is not an error.
    """
    return gate_with(make_judge(budget, reference, labels), candidate, runtime)


def gate_with(judge: Judge, candidate: Arrays, runtime: str = "") -> GateResult:
    """`gate` for one of many variants of the same FP32 outputs."""
    try:
        verdict = judge.judge(candidate)
        metrics = overview(judge.reference, candidate) | verdict.metrics
    except AccuracyError as error:
        raise BuildError(error.message) from error
    return GateResult(
        passed=verdict.passed,
        budget=judge.budget.texts,
        # JSON has no infinity; `non_finite` and the reason tell of it.
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        samples=len(next(iter(judge.reference.values()))),
        reason=_reason(verdict, runtime),
    )


def overview(reference: Arrays, candidate: Arrays) -> dict[str, float]:
    """Every distance and similarity that applies; with several outputs the keys end in `@output`."""
    found = {}
    for name, array in reference.items():
        suffix = f"@{name}" if len(reference) > 1 else ""
        for metric, value in Comparison(array, candidate[name]).overview().items():
            found[metric + suffix] = value
    return found


def worst_samples(reference: Arrays, candidate: Arrays, count: int) -> list[int]:
    """The indices of the `count` samples that moved farthest, the worst first.

    Of several outputs the one that moved most counts, each measured by the spread of its own answers.
    """
    moved = [
        Comparison(array, candidate[name]).per_sample("rel_spread" if array.dtype.kind == "f" else "max_abs")
        for name, array in reference.items()
    ]
    order = np.argsort(-np.max(moved, axis=0), kind="stable")
    return [int(index) for index in order[:count]]


def _budget(texts: Sequence[str]) -> Budget:
    return Budget(tuple(parse_term(text) for text in texts))


def _reason(verdict: Verdict, runtime: str) -> str:
    return f"on {runtime}: {verdict.reason}" if runtime and not verdict.passed else verdict.reason


def _floats(reference: Mapping[str, Array]) -> list[tuple[str, Array]]:
    return [(name, array) for name, array in reference.items() if array.dtype.kind == "f"]


def _sanity_terms(reference: Mapping[str, Array], strict: bool) -> list[str]:
    terms = []
    for name, array in _floats(reference):
        terms.append(f"rel_spread.max@{name}<={_SANE_SPREAD[strict]}")
        if holds_probabilities(array):
            terms.append(f"max_abs@{name}<={_SANE_PROBABILITY[strict]}")
    return terms or _equality_terms(reference, strict)


def _divergence_terms(reference: Mapping[str, Array], strict: bool) -> list[str]:
    terms = []
    for name, array in _floats(reference):
        terms.append(f"rel_spread.p99@{name}<={_QUANTILE_SPREAD[strict]}")
        terms.append(f"rel_spread.max@{name}<={_WORST_SPREAD[strict]}")
        if holds_probabilities(array):
            terms.append(f"max_abs@{name}<={_WORST_PROBABILITY[strict]}")
    return terms or _equality_terms(reference, strict)


def _equality_terms(reference: Mapping[str, Array], strict: bool) -> list[str]:
    """Outputs without a floating-point number among them: so many answers must be the same."""
    return [f"equal@{name}>={_EQUAL[strict]}" for name in reference]
