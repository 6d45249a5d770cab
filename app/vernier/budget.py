"""Budgets: how far a variant may stray from FP32 before it is refused.

A budget is one or more terms, joined with `,` or `;`, all of which must hold:

    auc>=99%                 a share of FP32's own task metric, on labelled data
    log_loss>=99%            99 % as good: for a metric that is better when smaller, at most 101 % of FP32's
    wer>=99%                 error rates: 99 % of FP32's share of right tokens, 1 − rate (MLPerf's reading)
    accuracy>=0.92           an absolute bound
    max_abs<=0.05            distance from FP32's outputs over the whole set; top1>=99% for a similarity
    rel_l2.p99<=0.02         a statistic of the samples' own values: mean, min, max, p99 …
    max_abs.max@boxes<=2     one output of several; otherwise a term holds for each output it applies to
    my.metrics:ndcg>=99%     any function of (outputs, labels) → float

The parts that need no data are here: the language and its meaning. What to demand when nobody says
anything is `vernier.builder.searching.gate`'s to decide.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from vernier.accuracy import (
    Comparison,
    Task,
    bigger_is_better,
    find_task,
    is_divergence,
    is_similarity,
    is_statistic,
    is_task_metric,
    spread_of,
)
from vernier.errors import AccuracyError, BuildError
from vernier.tensors import Array, Arrays

_TERM = re.compile(
    r"(?P<metric>[A-Za-z_][\w.]*:[A-Za-z_]\w*|[a-z]\w*)(?:\.(?P<statistic>[a-z][\d.]*|[a-z]+))?(?:@(?P<output>.+?))?"
    r"\s*(?P<sign><=|>=)\s*(?P<limit>\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)\s*(?P<percent>%)?"
)
#: Rates between 0 and 1 of which the share that is right counts.
_ERROR_RATES = ("wer", "cer")
#: Rounding in the last digits must not refuse a variant that equals its limit.
_ROUNDING = 1e-12

Metric = Callable[[Arrays, Optional[Array]], float]


@dataclass(frozen=True)
class Term:
    """One bound. `share` is True where `limit` (1.0 is 100 %) is relative to FP32's value."""

    metric: str
    statistic: Optional[str]
    output: Optional[str]
    at_least: bool
    limit: float
    share: bool

    @property
    def key(self) -> str:
        """The left side, such as `max_abs.p99@boxes`."""
        statistic = f".{self.statistic}" if self.statistic else ""
        return self.metric + statistic + (f"@{self.output}" if self.output else "")

    @property
    def text(self) -> str:
        number = f"{self.limit * 100:.10g}%" if self.share else f"{self.limit:.10g}"
        return f"{self.key}{'>=' if self.at_least else '<='}{number}"

    @property
    def is_custom(self) -> bool:
        return ":" in self.metric

    @property
    def needs_labels(self) -> bool:
        return is_task_metric(self.metric)

    def bound(self, reference: float) -> Tuple[bool, float]:
        """Whether the value must be at least (else at most) what, given FP32's value of a task metric."""
        if not self.share:
            return self.at_least, self.limit
        if not self.at_least:
            return False, self.limit * reference
        if self.metric in _ERROR_RATES:
            return False, 1.0 - self.limit * (1.0 - reference)
        if is_task_metric(self.metric) and not bigger_is_better(self.metric):
            return False, (2.0 - self.limit) * reference
        if reference <= 0:
            raise BuildError(
                f"{self.text} takes a share of FP32's own {self.metric}, and that is {reference:.6g}: "
                f"give an absolute bound, such as {self.metric}>=0.9"
            )
        return True, self.limit * reference


@dataclass(frozen=True)
class Finding:
    """What one term found.

    limit: the bound in the metric's own unit, after shares are taken.
    used: the part of what was allowed that is used up; 0 is as good as FP32, above 1 is refused.
    reference: FP32's value of a task metric.
    """

    term: Term
    value: float
    limit: float
    used: float
    passed: bool
    reference: Optional[float] = None

    @property
    def sentence(self) -> str:
        beside = (
            ""
            if self.reference is None
            else f" (FP32: {self.reference:.6g}, so the limit is {self.limit:.6g})"
        )
        return f"{self.term.key} is {self.value:.6g}{beside}, and the budget is {self.term.text}"


@dataclass(frozen=True)
class Verdict:
    """Passed only if every term held. `used` is the largest of the findings'."""

    findings: Tuple[Finding, ...]
    non_finite: int

    @property
    def passed(self) -> bool:
        return not self.non_finite and all(finding.passed for finding in self.findings)

    @property
    def used(self) -> float:
        return math.inf if self.non_finite else max(finding.used for finding in self.findings)

    @property
    def reason(self) -> str:
        """Empty when passed; otherwise what was missed, worst first."""
        if self.non_finite:
            return f"{self.non_finite} samples have an answer with NaN or an infinity, which no budget allows"
        missed = sorted((f for f in self.findings if not f.passed), key=lambda f: -f.used)
        return "; ".join(finding.sentence for finding in missed)

    @property
    def metrics(self) -> Dict[str, float]:
        return {finding.term.key: finding.value for finding in self.findings}


@dataclass(frozen=True)
class Budget:
    terms: Tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads the language above. Raises BuildError with what to write instead."""
        terms = tuple(parse_term(part.strip()) for part in re.split(r"[,;]", text) if part.strip())
        if not terms:
            raise BuildError("the budget is empty: write for example auc>=99% or max_abs.max<=0.05")
        return cls(terms)

    @classmethod
    def from_limits(cls, limits: Mapping[str, float]) -> Budget:
        """The inverse of `limits`."""
        texts = (f"{key}{'>=' if _bigger(key) else '<='}{limit!r}" for key, limit in limits.items())
        return cls(tuple(parse_term(text) for text in texts))

    def limits(self) -> Dict[str, float]:
        """The terms that need neither labels nor code, for golden vectors and live traffic: key → bound."""
        return {term.key: term.limit for term in self.terms if is_divergence(term.metric)}

    @property
    def texts(self) -> List[str]:
        return [term.text for term in self.terms]

    @property
    def bounds_samples(self) -> bool:
        """Whether a term bounds single answers, so that an average cannot hide a broken one."""
        return any(
            is_divergence(t.metric) and (t.statistic is not None or t.metric == "max_abs") for t in self.terms
        )

    def judge(self, reference: Arrays, candidate: Arrays, labels: Optional[Array] = None) -> Verdict:
        """Compares once; for many candidates of one reference see `Judge`."""
        return Judge(self, reference, labels).judge(candidate)


@dataclass
class Judge:
    """A budget with the FP32 outputs it is to be held against, which are measured only once.

    Raises:
        BuildError: a term needs labels, an output that is not there, or a metric that cannot be loaded.
        AccuracyError: labels and outputs do not fit.
    """

    budget: Budget
    reference: Arrays
    labels: Optional[Array] = None
    _metrics: Dict[str, Tuple[Metric, float]] = field(default_factory=dict, init=False)
    _tasks: Dict[str, Task] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for term in self.budget.terms:
            if term.output is not None and term.output not in self.reference:
                raise BuildError(
                    f"the budget names the output '{term.output}', and the model has {', '.join(self.reference)}"
                )
            if term.needs_labels and self.labels is None:
                raise BuildError(
                    f"{term.text} needs labels: give --eval with an array named 'label', or a budget such as "
                    f"rel_l2.p99<=0.02 that needs none"
                )
            if not is_divergence(term.metric):
                metric = load_metric(term.metric) if term.is_custom else self._task_metric(term)
                self._metrics[term.key] = metric, _call(term, metric, self.reference, self.labels)

    def judge(self, candidate: Arrays) -> Verdict:
        comparisons = {}
        for name, array in self.reference.items():
            if name not in candidate:
                raise AccuracyError(f"the candidate has no output '{name}'")
            comparisons[name] = Comparison(array, candidate[name])
        non_finite = max(int((~c.finite).sum()) for c in comparisons.values())
        return Verdict(
            tuple(self._find(term, comparisons, candidate) for term in self.budget.terms), non_finite
        )

    def metric_of(self, term: Term) -> Metric:
        """The function behind a term on task metrics or custom ones. KeyError for distances."""
        return self._metrics[term.key][0]

    def reference_of(self, term: Term) -> float:
        """FP32's own value of a term on task metrics or custom ones. KeyError for distances."""
        return self._metrics[term.key][1]

    def per_sample(self, term: Term, candidate: Arrays) -> Array:
        """A distance or similarity of each sample, the worst of the outputs that the term applies to.

        The candidate may have answered the first samples alone.
        """
        comparisons = {
            name: Comparison(array[: len(candidate[name])], candidate[name], _spread(array))
            for name, array in self.reference.items()
        }
        found = [c.per_sample(term.metric) for c in _applicable(term, comparisons)]
        return np.asarray(np.min(found, axis=0) if term.at_least else np.max(found, axis=0))

    def task_of(self, term: Term) -> Optional[Task]:
        """The task behind a term on a built-in task metric."""
        return self._tasks.get(term.key)

    def _task_metric(self, term: Term) -> Metric:
        task = find_task(self.reference, np.asarray(self.labels), term.metric, term.output)
        self._tasks[term.key] = task
        return lambda outputs, labels: task.measure(outputs, np.asarray(labels))

    def _find(self, term: Term, comparisons: Mapping[str, Comparison], candidate: Arrays) -> Finding:
        if is_divergence(term.metric):
            return self.assess(term, _worst(term, comparisons))
        return self.assess(term, _call(term, self.metric_of(term), candidate, self.labels))

    def assess(self, term: Term, value: float) -> Finding:
        """What the term says of a value that was measured before, such as one in a manifest."""
        if is_divergence(term.metric):
            allowed, lost = (1 - term.limit, 1 - value) if term.at_least else (term.limit, value)
            return _finding(term, value, term.limit, lost, allowed, term.at_least, None)
        reference = self._metrics[term.key][1]
        at_least, limit = term.bound(reference)
        sign = 1 if at_least else -1
        return _finding(
            term, value, limit, sign * (reference - value), sign * (reference - limit), at_least, reference
        )


def _spread(reference: Array) -> Optional[float]:
    return spread_of(reference) if reference.dtype.kind == "f" else None


def load_metric(name: str) -> Metric:
    """The function of `module:function`; modules in the working directory are found too. Raises BuildError."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise BuildError(f"cannot load the metric {name}: {error}; give module:function") from error
    if not callable(found):
        raise BuildError(f"{name} is not a function: give module:function of (outputs, labels)")
    metric: Metric = found
    return metric


def _call(term: Term, metric: Metric, outputs: Arrays, labels: Optional[Array]) -> float:
    value = metric(outputs, labels)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise BuildError(f"{term.metric} returned {type(value).__name__}: return one number") from error


def _finding(
    term: Term,
    value: float,
    limit: float,
    lost: float,
    allowed: float,
    at_least: bool,
    reference: Optional[float],
) -> Finding:
    slack = _ROUNDING * max(1.0, abs(limit))
    passed = math.isfinite(value) and (value >= limit - slack if at_least else value <= limit + slack)
    if passed:
        used = min(1.0, max(0.0, lost) / allowed) if allowed > 0 else 0.0
    else:
        used = max(lost / allowed, 1.0 + 1e-9) if allowed > 0 and math.isfinite(lost) else math.inf
    return Finding(term, value, limit, used, passed, reference)


def _worst(term: Term, comparisons: Mapping[str, Comparison]) -> float:
    """The term's value, the worst of the outputs that it applies to."""
    values = [c.value(term.metric, term.statistic) for c in _applicable(term, comparisons)]
    return min(values) if term.at_least else max(values)


def _applicable(term: Term, comparisons: Mapping[str, Comparison]) -> List[Comparison]:
    """The outputs that a term speaks of. Raises BuildError when there is none."""
    if term.output is not None:
        return [comparisons[term.output]]
    # Class numbers have no distance from one another, unless there is nothing else to look at.
    named = {n: c for n, c in comparisons.items() if c.reference.dtype.kind == "f" or term.metric == "equal"}
    found, refusal = [], None
    for comparison in (named or comparisons).values():
        try:
            comparison.value(term.metric, term.statistic)
        except AccuracyError as error:
            refusal = error
        else:
            found.append(comparison)
    if not found:
        raise BuildError(f"{term.text} applies to no output: {refusal}")
    return found


def _bigger(key: str) -> bool:
    return is_similarity(re.split(r"[.@]", key)[0])


def parse_term(text: str) -> Term:
    """Reads one term, whose output's name may hold any character. Raises BuildError."""
    match = _TERM.fullmatch(text)
    if match is None:
        raise BuildError(
            f"'{text}' is no budget: write metric, sign and limit, such as auc>=99%, max_abs.max<=0.05 or "
            f"rel_l2.p99@scores<=0.02"
        )
    metric, statistic, at_least = match["metric"], match["statistic"], match["sign"] == ">="
    limit = float(match["limit"]) / (100 if match["percent"] else 1)
    divergence, task = is_divergence(metric), is_task_metric(metric)
    if not divergence and not task and ":" not in metric:
        raise BuildError(
            f"'{metric}' is no metric: use auc, accuracy, f1, log_loss, rmse, wer, cer, rel_l2, max_abs, rel_spread, "
            f"cosine, equal, top1, kendall, ndcg, or module:function"
        )
    if statistic is not None and not (divergence and is_statistic(statistic)):
        raise BuildError(
            f"'{text}': a statistic (mean, min, max, p99 …) of single samples exists for distances and similarities "
            f"only, such as rel_l2.p99<=0.02"
        )
    if metric == "max_abs" and match["percent"]:
        raise BuildError(
            f"'{text}': max_abs is in the output's own unit, so it takes no percentage: write max_abs<={limit:g}, or "
            f"bound a relative error, such as rel_l2.max<={match['limit']}%"
        )
    share = bool(match["percent"]) and not divergence
    if divergence or (task and not share):
        better_bigger = is_similarity(metric) if divergence else bigger_is_better(metric)
        if better_bigger != at_least:
            raise BuildError(f"'{text}' would demand a worse model: write {'>=' if better_bigger else '<='}")
    if is_similarity(metric) and limit > 1:
        raise BuildError(f"'{text}' can never hold: {metric} is at most 1, or 100%")
    if share and (limit > 1 if at_least else limit < 1 or (task and bigger_is_better(metric))):
        raise BuildError(
            f"'{text}' would demand what FP32 itself does not reach, or a worse model: write {metric}>=99%"
        )
    return Term(metric, statistic, match["output"], at_least, limit, share)
