"""Weighs evidence: what the data of a build can prove about the variants that are judged on it.

What proves nothing is refused (GateRefused, one sentence that says what to do); what is doubtful is a
warning. Pure functions of what is known about the data and of FP32's answers.

How many samples a claim needs: if no more than a share p of all cases may be worse, and none of n independent samples
is, then n must be at least ln(0.05) / ln(1 − p) to say so with 95 % confidence: Clopper and Pearson's exact bound
for zero of n, about 3/p, the rule of three (Hanley and Lippman-Hand 1983). For a percentile of single samples
the same number is Wilks's (1941): the worst of n lies beyond the percentile. A claim about every answer, which no
number of samples can show, is read as 99 % of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vernier.accuracy import Task, bigger_is_better
from vernier.budget import Judge, Term
from vernier.builder.samples.survey import Survey
from vernier.errors import AccuracyError, GateRefused
from vernier.package.manifest import EvidenceWarning
from vernier.tensors import Array, Arrays

#: What a bound on the worst sample is taken to claim: so small a share of the answers is outside.
_OUTSIDE = 0.01
_CONFIDENCE = 0.95
#: With fewer calibration samples more than one fresh sample in a hundred is expected beyond the largest value seen.
_LEAST_CALIBRATION = 99
#: Answers that differ by less than this part of the largest are the same.
_ALIKE = 1e-6
#: Other orders in which labels are taken: by chance FP32 is better on the right one than on all of these in 1 of 20.
_ORDERS, _ORDER_SEED = 19, 1
#: Enough to tell labels from labels in another order; error rates align texts in Python, which takes its time.
_MOST_LABELS, _MOST_TEXTS, _MOST_VALUES = 4096, 64, 1 << 22
#: Fewer labels are as good in some other order by luck; that they are few is said anyway.
_LEAST_LABELS = 20
_SHOWN = 3
_SHARES = ("accuracy", "auc", "f1", "wer", "cer")

Warnings = list[EvidenceWarning]


def samples_needed(share: float, confidence: float = _CONFIDENCE) -> int:
    """How many independent samples, none of them outside, show that at most `share` of all are outside."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-share))


def most_outside(samples: int, confidence: float = _CONFIDENCE) -> float:
    """The largest share of all samples outside that fits none of `samples` independent ones being outside."""
    return float(1 - (1 - confidence) ** (1 / samples))


def weigh_calibration(found: Survey, independent: int, quantizes: bool) -> Warnings:
    """What calibration data shows of the ranges of INT8 and FP8.

    Args:
        independent: how many independent samples are calibrated on; those of `found` less what is kept back.

    Raises:
        GateRefused: the samples are all the same, or no float input spans a range.
    """
    if not quantizes:
        return []
    if found.floats and set(found.flat) == set(found.floats):
        raise GateRefused(
            f"the calibration data spans no range: every value of {_names(found.flat)} is the same number, so nothing "
            f"can be quantized by it; give --calibration samples as the model meets them when it serves"
        )
    if found.samples > 1 and found.distinct == 1:
        raise GateRefused(
            f"all {found.samples} calibration samples are copies of one, so they show no range; give --calibration "
            f"samples as the model meets them when it serves"
        )
    warnings = _copies(found, "calibration") + _constant(found, "calibration")
    if independent < _LEAST_CALIBRATION:
        beyond = 1 / (independent + 1)
        warnings.append(
            _warning(
                "few_calibration_samples",
                f"INT8's ranges come from {_independent(independent)}, and of every activation one fresh sample in "
                f"{independent + 1} ({beyond:.0%}) is expected beyond the largest value of so many: calibrate on "
                f"{_LEAST_CALIBRATION} or more",
            )
        )
    return warnings


def weigh_evaluation(found: Survey, independent: int, reduces: bool) -> Warnings:
    """What evaluation data can show, whatever the model answers.

    Args:
        independent: how many independent samples judge; those of `found`, or what is kept back of them.

    Raises:
        GateRefused: reduced precisions are wanted, and the samples are all the same or of one group.
    """
    if reduces and found.samples > 1 and found.distinct == 1:
        raise GateRefused(
            f"all {found.samples} evaluation samples are copies of one, so they prove nothing about others; give "
            f"--eval samples as the model meets them when it serves"
        )
    if reduces and found.samples > 1 and independent == 1:
        raise GateRefused(
            "all samples that judge belong to one group, so they prove nothing about others; give --eval samples of "
            "several groups"
        )
    return _copies(found, "evaluation") + _constant(found, "evaluation")


def weigh_overlap(calibration: Survey, evaluation: Survey) -> Warnings:
    """Samples that ranges and roundings were chosen on, and that judge them too."""
    shared = int(np.isin(evaluation.fingerprints, calibration.fingerprints).sum())
    if not shared:
        return []
    whole = shared == evaluation.samples
    return [
        _warning(
            "calibration_overlap",
            f"{'all' if whole else 'of the'} {evaluation.samples} evaluation samples"
            f"{'' if whole else f' {shared}'} are calibration samples too, and show nothing about samples that no "
            f"choice was made on: give others with --eval, or leave it out, and a third of the calibration data is "
            f"kept back",
        )
    ]


def weigh_answers(reference: Mapping[str, Array], reduces: bool) -> Warnings:
    """What FP32 answers to the evaluation data.

    Raises:
        GateRefused: reduced precisions are wanted, and FP32 answers the same to every sample.
    """
    constant = [name for name, array in reference.items() if _is_constant(array)]
    samples = len(next(iter(reference.values())))
    if reduces and constant and len(constant) == len(reference):
        what = "there is one evaluation sample" if samples == 1 else "FP32 answers the same to all of them"
        raise GateRefused(
            f"the {samples} evaluation sample{'s' if samples > 1 else ''} prove nothing: {what}, so a variant that "
            f"always answers the same would pass; give --eval samples as the model meets them when it serves"
        )
    if not constant:
        return []
    return [
        _warning(
            "constant_outputs",
            f"FP32 answers the same to every evaluation sample in {_names(constant)}, so nothing is shown about other "
            f"answers there: evaluate on samples that differ in it",
        )
    ]


def weigh_labels(judge: Judge) -> Warnings:
    """Whether the labels belong to the samples, for the terms of the budget that need them."""
    if judge.labels is None:
        return []
    labels = np.asarray(judge.labels)
    for term in judge.budget.terms:
        task = judge.task_of(term)
        if task is None:
            continue
        if (labels == labels.reshape(-1)[0]).all():
            return [
                _warning(
                    "constant_labels",
                    f"every label is {labels.reshape(-1)[0]}, so {term.text} says nothing about samples of other "
                    f"labels: evaluate on some of every kind",
                )
            ]
        if len(labels) >= _LEAST_LABELS and is_at_chance(task, judge.reference, labels):
            return [
                _warning(
                    "labels_at_chance",
                    f"FP32's {term.metric} is {task.measure(judge.reference, labels):.4g}, no better than on the same "
                    f"labels in another order, and a share of chance proves nothing: check that the labels belong "
                    f"to these samples in this order, or judge by distance, such as --budget rel_spread.max<=0.2",
                )
            ]
    return []


def is_at_chance(task: Task, outputs: Arrays, labels: Array) -> bool:
    """Whether a metric is no better on the labels than on the same labels in some other order.

    A permutation test (Pitman 1937, with the plus one of Phipson and Smyth 2010) that takes labels without meaning
    for meaningful with a chance of 1 in 20.
    """
    rng = np.random.default_rng(_ORDER_SEED)
    most = _MOST_TEXTS if task.metric in ("wer", "cer") else _MOST_LABELS
    values = max(1, outputs[task.output].size // len(labels))
    chosen = rng.permutation(len(labels))[: max(_LEAST_LABELS, min(most, _MOST_VALUES // values))]
    part, labels = {task.output: outputs[task.output][chosen]}, labels[chosen]
    sign = 1.0 if bigger_is_better(task.metric) else -1.0
    try:
        found = sign * task.measure(part, labels)
        others = (task.measure(part, labels[rng.permutation(len(labels))]) for _ in range(_ORDERS))
        return any(sign * other >= found for other in others)
    except AccuracyError:  # such as one class only among the chosen
        return False


def weigh_claims(judge: Judge, independent: int, samples: int) -> Warnings:
    """Warns when the terms of the budget would need more independent samples than there are."""
    needed = {
        term.text: samples_needed(share) for term in judge.budget.terms if (share := _claim(term, judge))
    }
    missing = sorted(
        ((count, text) for text, count in needed.items() if count > independent), key=lambda found: -found[0]
    )
    if not missing:
        return []
    terms = ", ".join(f"{count:,} for {text}" for count, text in missing[:_SHOWN])
    labelled = any(
        term.needs_labels and term.text in {text for _, text in missing} for term in judge.budget.terms
    )
    return [
        _warning(
            "few_labels" if labelled else "few_samples",
            f"the variants are judged on {_independent(independent, samples)}, which can show (with 95 % confidence) "
            f"that at most {100 * most_outside(independent):.2g} % of the answers are worse, and the budget "
            f"claims more than that; by the rule of three that takes, all of them passing, {terms}",
        )
    ]


def weigh_ranges(peaks: Mapping[str, float], activations: Sequence[str]) -> Warnings:
    """Activations that are quantized and were nothing but zero in the calibration data.

    Raises:
        GateRefused: all of them were.
    """
    zero = [name for name in activations if peaks.get(name, 1.0) == 0.0]
    if not zero:
        return []
    if len(zero) == len(activations):
        raise GateRefused(
            "every activation that could be quantized was zero in all calibration samples, so INT8 has no range; "
            "give --calibration samples as the model meets them when it serves"
        )
    return [
        _warning(
            "zero_ranges",
            f"{len(zero)} of {len(activations)} quantized activations were zero in every calibration sample "
            f"({_names(zero)}), and INT8 clips whatever else they hold when it serves: calibrate on samples that "
            f"reach them",
        )
    ]


def weigh_unread(unread: Sequence[str], label_key: str) -> Warnings:
    """Arrays of the evaluation data that are neither inputs nor labels: labels, perhaps, under another name."""
    if not unread:
        return []
    return [
        _warning(
            "unread_arrays",
            f"the data that judges has no array '{label_key}', and nothing reads its {_names(unread)}: if one of these "
            f"holds the labels, name it with --label-key",
        )
    ]


def weigh_groups_shared(calibration: Array, evaluation: Array) -> Warnings:
    """Groups (by the values of the group key) that are calibrated on and judge."""
    groups = np.unique(evaluation)
    shared = int(np.isin(groups, calibration).sum())
    if not shared:
        return []
    return [
        _warning(
            "group_overlap",
            f"{shared} of {len(groups)} groups of the evaluation data are in the calibration data too, and show "
            f"nothing about groups that no choice was made on: keep groups apart",
        )
    ]


def _claim(term: Term, judge: Judge) -> float | None:
    """The share of answers that may be worse, as far as the term speaks of a share; None where it does not."""
    share = None
    if term.statistic in ("max", "min") or (term.metric == "max_abs" and term.statistic is None):
        share = _OUTSIDE
    elif term.statistic is not None and term.statistic.startswith("p"):
        share = float(term.statistic[1:]) / 100 if term.at_least else 1 - float(term.statistic[1:]) / 100
    elif term.metric in _SHARES:
        finding = judge.assess(term, judge.reference_of(term))
        share = abs(finding.limit - (finding.reference or 0.0))
    elif term.share or (term.statistic is None and term.metric in ("equal", "top1")):
        share = abs(1 - term.limit)
    return share if share is not None and 0 < share < 1 else None


def _is_constant(array: Array) -> bool:
    flat = array.reshape(len(array), -1)
    if not flat.size:
        return True
    if flat.dtype.kind != "f":
        return bool((flat == flat[:1]).all())
    largest = float(np.abs(flat).max())
    return float((flat.max(axis=0) - flat.min(axis=0)).max()) <= _ALIKE * largest


def _copies(found: Survey, which: str) -> Warnings:
    if found.distinct == found.samples:
        return []
    return [
        _warning(
            f"{which}_copies",
            f"only {found.distinct:,} of {found.samples:,} {which} samples differ; copies count once, so give others "
            f"instead",
        )
    ]


def _constant(found: Survey, which: str) -> Warnings:
    if not found.constant or found.samples == 1:
        return []
    return [
        _warning(
            f"{which}_constant_inputs",
            f"{_names(found.constant)} never changes in the {which} data, so nothing is known about other values: let "
            f"it change as it does when the model serves",
        )
    ]


def _independent(count: int, samples: int | None = None) -> str:
    number = f"{count:,} independent sample{'' if count == 1 else 's'}"
    return number if samples in (None, count) else f"{number} ({samples:,} in all)"


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _warning(code: str, message: str) -> EvidenceWarning:
    return EvidenceWarning(code=code, message=message)
