"""How much of a budget is used up, with the doubt that a finite number of samples leaves.

A task metric changes when single answers flip, and on a few hundred samples flips for the worse and for
the better may cancel by luck. What selects a precision therefore counts two standard errors of the
metric's loss as lost too: by the paired jackknife (Efron and Stein 1981) over blocks of samples, which
takes any metric, and for decisions not below what their margins let expect.

The worst of many samples is worse than the worst of a few. A bound on single answers is therefore held
against what the worst of ten times as many samples will pass with one chance in ten, taking the tail for
exponential: each doubling of the samples, and each halving of the chance, then adds log 2 times the mean by
which the largest values exceed a threshold, whichever of several thresholds says most.

Samples of one group (crops of one photo, copies) are not independent of one another. Where groups are known, the doubt
counts groups: blocks hold whole groups, a flip in one is one flip, and the tail is that of the groups' worst samples.

The gate itself takes the budget at its word.
"""

from __future__ import annotations

import math

import numpy as np

from vernier.accuracy import decisions, flip_rate
from vernier.budget import Finding, Judge, Metric, Term
from vernier.errors import AccuracyError
from vernier.tensors import Array, Arrays

#: The worst sample is extrapolated to so many times as many samples, and passed with this chance.
_AS_MANY_AGAIN, _CHANCE = 10.0, 0.1

_STANDARD_ERRORS = 2.0

_BLOCKS = 32
#: Error rates align texts in Python, which takes its time.
_BLOCKS_OF_TEXT = 8


class CautiousJudge:
    """A judge that counts the doubt as lost: of built-in task metrics, and of bounds on the worst sample.

    Args:
        samples: how many the doubt of a task metric will be counted on in the end, if more than these.
        groups: [samples], equal where samples are not independent of one another; None where all are.
    """

    def __init__(self, judge: Judge, samples: int = 0, groups: Array | None = None) -> None:
        self.judge = judge
        self._samples = samples
        #: [samples], from 0 on; None where every sample is a group of its own.
        self._groups = None if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
        self._reference: dict[str, Array] = {}

    def used(self, candidate: Arrays) -> float:
        """The part of the budget that is used up, doubt included; infinite for non-finite answers.

        Raises AccuracyError when outputs cannot be compared.
        """
        verdict = self.judge.judge(candidate)
        if verdict.non_finite:
            return math.inf
        return max(self._used(finding, candidate) for finding in verdict.findings)

    def worst_of_some(self, candidate: Arrays) -> float:
        """The part of the budget that the worst of the first samples uses up, without any doubt.

        No more than all of them use up; 0 where the budget bounds no single answer.
        """
        used = [0.0]
        for term in self.judge.budget.terms:
            if term.statistic in ("max", "min") or (term.metric == "max_abs" and term.statistic is None):
                values = self.judge.per_sample(term, candidate)
                used.append(
                    self.judge.assess(term, float(values.min() if term.at_least else values.max())).used
                )
        return max(used)

    def _used(self, finding: Finding, candidate: Arrays) -> float:
        term, reference = finding.term, finding.reference
        if not math.isfinite(finding.value):
            return finding.used
        if term.statistic in ("max", "min") or (term.metric == "max_abs" and term.statistic is None):
            farther = self._farther(term, candidate)
            return max(finding.used, self.judge.assess(term, finding.value + farther).used)
        if not term.needs_labels or reference is None:
            return finding.used
        allowed = abs(reference - finding.limit)
        if not allowed:
            return finding.used
        # Being better than FP32 on these samples is luck as well, and buys nothing.
        lost = max(
            0.0, reference - finding.value if finding.limit <= reference else finding.value - reference
        )
        error = max(self._standard_error(term, candidate), self._error_of_flips(term, candidate))
        here = len(np.asarray(self.judge.labels))
        error *= math.sqrt(here / max(here, self._samples))
        return max(finding.used, (lost + _STANDARD_ERRORS * error) / allowed)

    def _farther(self, term: Term, candidate: Arrays) -> float:
        """How much worse the worst of ten times as many samples may well be, with the sign of worse."""
        values = self.judge.per_sample(term, candidate)
        direction = -1.0 if term.at_least else 1.0
        ordered = np.sort(self._worst_of_groups(direction * values))
        lengths = [2**i for i in range(1, 16) if 4**i <= len(ordered)] or [1] * (len(ordered) > 1)
        # What happens rarely (a value that clips) shows in the few largest, the rest in many.
        excesses = [float(np.mean(ordered[-n:]) - ordered[-n - 1]) for n in lengths]
        return direction * max(excesses, default=0.0) * math.log(_AS_MANY_AGAIN / _CHANCE)

    def _worst_of_groups(self, values: Array) -> Array:
        if self._groups is None:
            return values
        worst = np.full(int(self._groups.max()) + 1, -np.inf)
        np.maximum.at(worst, self._groups, values)
        return worst

    def _standard_error(self, term: Term, candidate: Arrays) -> float:
        metric = self.judge.metric_of(term)
        if term.key not in self._reference:
            self._reference[term.key] = self._leave_out(term, metric, self.judge.reference)
        differences = self._reference[term.key] - self._leave_out(term, metric, candidate)
        differences = differences[np.isfinite(differences)]
        blocks = len(differences)
        if blocks < 2:
            return math.inf
        return float(np.sqrt((blocks - 1) / blocks * np.sum((differences - differences.mean()) ** 2)))

    def _error_of_flips(self, term: Term, candidate: Arrays) -> float:
        """The standard error that flips for the worse and for the better leave, if as many occur as are expected.

        Where none occurred the jackknife sees nothing, and yet the next samples may show some.
        """
        task = self.judge.task_of(term)
        if task is None:
            return 0.0
        labels = np.asarray(self.judge.labels)
        rate = flip_rate(task, self.judge.reference[task.output], candidate[task.output], labels)
        independent = 1.0 if self._groups is None else (int(self._groups.max()) + 1) / len(labels)
        return math.sqrt((rate or 0.0) / max(1.0, independent * decisions(task, labels)))

    def _leave_out(self, term: Term, metric: Metric, outputs: Arrays) -> Array:
        """The metric without each block of samples; NaN where it cannot be had (one class only)."""
        labels = np.asarray(self.judge.labels)
        groups = np.arange(len(labels)) if self._groups is None else self._groups
        blocks = min(_BLOCKS_OF_TEXT if term.metric in ("wer", "cer") else _BLOCKS, int(groups.max()) + 1)
        block = groups % blocks
        found = np.full(blocks, np.nan)
        for index in range(blocks):
            kept = block != index
            try:
                found[index] = metric({name: array[kept] for name, array in outputs.items()}, labels[kept])
            except AccuracyError:
                continue
        return found
