"""Task metrics: what the outputs are worth, judged by labels.

A `Task` says which metric on which output, and how that output is to be read (probabilities or not). It
is found once, from the FP32 outputs, and then measures every variant in the same way: a variant must
not be read otherwise because one of its scores left [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from vernier.accuracy.text import ctc_tokens, error_rate
from vernier.errors import AccuracyError
from vernier.tensors import Array, shape_text

#: Probabilities are kept this far from 0 and 1, so that one sure mistake does not decide the log loss.
_LEAST_PROBABILITY = 1e-7
#: How far above 1 rounding may leave a probability.
_ABOVE_ONE = 0.01


@dataclass(frozen=True)
class Task:
    """One metric on one output.

    probabilities: whether the output holds probabilities; otherwise logits or other scores.
    """

    metric: str
    output: str
    probabilities: bool

    def measure(self, outputs: Mapping[str, Array], labels: Array) -> float:
        """The metric. NaN, which fails every budget, when the output holds NaN or an infinity.

        Raises:
            AccuracyError: nothing to compare, or labels and output do not fit together.
        """
        if self.output not in outputs:
            raise AccuracyError(f"there is no output '{self.output}': use one of {', '.join(outputs)}")
        output, labels = np.asarray(outputs[self.output]), np.asarray(labels)
        if output.size == 0 or labels.size == 0:
            raise AccuracyError("there is nothing to compare: give at least one sample with its label")
        if output.ndim == 0 or labels.ndim == 0 or len(output) != len(labels):
            raise AccuracyError(
                f"output '{self.output}' has shape {shape_text(output.shape)} and the labels "
                f"{shape_text(labels.shape)}: give one label for each sample"
            )
        if labels.dtype.kind not in "fiub" or (labels.dtype.kind == "f" and not np.isfinite(labels).all()):
            raise AccuracyError(
                "labels must be finite numbers; for anything else give a metric as module:function"
            )
        if output.dtype.kind == "f":
            if not np.isfinite(output).all():
                return float("nan")
            output = output.astype(np.float64)
        return _METRICS[self.metric][1](output, labels, self.probabilities)


def task_metric(
    name: str, outputs: Mapping[str, Array], labels: Array, output: Optional[str] = None
) -> float:
    """One task metric; `output` may be left out where only one fits. See `Task` for what it raises."""
    return find_task(outputs, labels, name, output).measure(outputs, labels)


def is_task_metric(name: str) -> bool:
    return name in _METRICS


def bigger_is_better(name: str) -> bool:
    return _METRICS[name][0]


def task_names() -> Tuple[str, ...]:
    return tuple(_METRICS)


def find_task(
    outputs: Mapping[str, Array], labels: Array, metric: Optional[str] = None, output: Optional[str] = None
) -> Task:
    """The task that labels and outputs speak of: binary labels → auc, classes → accuracy.

    Token sequences → wer, other numbers → rmse; of several outputs the first that fits.

    Args:
        outputs: the FP32 outputs.
        metric, output: what is known already.

    Raises:
        AccuracyError: no output fits the labels, or there is no such metric or output.
    """
    if metric is not None and metric not in _METRICS:
        raise AccuracyError(f"'{metric}' is no task metric: use {', '.join(_METRICS)} or module:function")
    if output is not None and output not in outputs:
        raise AccuracyError(f"there is no output '{output}': use one of {', '.join(outputs)}")
    names = [output] if output is not None else list(outputs)
    fitting = [(name, _natural_metric(np.asarray(outputs[name]), np.asarray(labels))) for name in names]
    # Labels of 0 and 1 are classes of any output with several values, but meant for the single score.
    for name, natural in sorted(fitting, key=lambda found: found[1] != "auc"):
        if natural is not None or output is not None:
            chosen = metric or natural
            if chosen is not None:
                return Task(chosen, name, holds_probabilities(np.asarray(outputs[name])))
    shapes = ", ".join(f"'{n}' {shape_text(np.shape(outputs[n]))}" for n in names)
    raise AccuracyError(
        f"labels of type {np.asarray(labels).dtype.name} and shape {shape_text(np.shape(labels))} fit no output "
        f"({shapes}): name metric and output in the budget, such as accuracy@{names[0]}>=99%, or give module:function"
    )


def holds_probabilities(output: Array) -> bool:
    """Whether every value is in [0, 1]: a softmax's or independent sigmoids'."""
    if output.dtype.kind != "f" or output.size == 0 or not np.isfinite(output).all():
        return False
    return bool(output.min() >= 0 and output.max() <= 1 + _ABOVE_ONE)


def _natural_metric(output: Array, labels: Array) -> Optional[str]:
    if output.ndim == 0 or labels.ndim == 0 or len(output) != len(labels) or labels.dtype.kind not in "fiub":
        return None
    if output.dtype.kind not in "fiu" or labels.size == 0:
        return None
    per_sample, wanted = output.size // len(output), labels.size // len(labels)
    whole = bool(np.all(labels == np.floor(labels)))
    binary = bool(np.isin(labels, (0, 1)).all())
    if output.dtype.kind == "f":
        if wanted == 1 and binary and per_sample in (1, 2):
            return "auc"
        if wanted == per_sample > 1 and binary and output.ndim == 2:
            return "accuracy" if bool((labels.reshape(len(labels), -1).sum(axis=1) == 1).all()) else "auc"
        if whole and class_axis(output, labels) is not None:
            return "accuracy"
        if wanted == per_sample:
            return "rmse"
        if whole and labels.ndim == 2 and output.ndim == 3:
            return "wer"
        return None
    if whole and wanted == per_sample == 1:
        return "accuracy"
    return "wer" if whole and labels.ndim == 2 and output.ndim == 2 else None


def class_axis(output: Array, labels: Array) -> Optional[int]:
    """The axis of the classes: labels have the output's shape without it. Images have it first, others last.

    None when there is no such axis.
    """
    shape = labels.shape[:-1] if labels.ndim > 1 and labels.shape[-1] == 1 else labels.shape
    if output.ndim != len(shape) + 1:
        return None
    for axis in (1, output.ndim - 1) if output.ndim >= 4 else (output.ndim - 1, 1):
        without = output.shape[:axis] + output.shape[axis + 1 :]
        if without == shape and output.shape[axis] >= 2 and labels.max() < output.shape[axis]:
            return axis
    return None


def _scores_of_positive(output: Array) -> Array:
    """[samples] scores: the only value, or by how much the second class is ahead of the first."""
    flat = output.reshape(len(output), -1)
    if flat.shape[1] == 1:
        return flat[:, 0]
    if flat.shape[1] == 2:
        return flat[:, 1] - flat[:, 0]
    raise AccuracyError(
        f"binary labels need one or two values per sample, and the output has {flat.shape[1]}: use accuracy, "
        f"or name another output, such as auc@score>=99%"
    )


def _binary_auc(scores: Array, positive: Array) -> float:
    """The chance that a positive scores above a negative, ties counting half (Mann and Whitney's U)."""
    positives = int(positive.sum())
    negatives = positive.size - positives
    if not positives or not negatives:
        raise AccuracyError("AUC needs labels of both kinds, 0 and 1: evaluate on more samples")
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2
    ranks = float(mean_rank[group.ravel()][positive].sum())
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)


def _auc(output: Array, labels: Array, probabilities: bool) -> float:
    """Binary, or for several independent labels the mean over those that occur both ways."""
    if not np.isin(labels, (0, 1)).all():
        raise AccuracyError("AUC needs labels of 0 and 1: use accuracy for classes")
    flat = labels.reshape(len(labels), -1)
    if flat.shape[1] == 1:
        return _binary_auc(_scores_of_positive(output), flat[:, 0] == 1)
    scores = output.reshape(len(output), -1)
    if scores.shape != flat.shape:
        raise AccuracyError(
            f"AUC of {flat.shape[1]} labels per sample needs as many scores, not {scores.shape[1]}"
        )
    both = [k for k in range(flat.shape[1]) if 0 < (flat[:, k] == 1).sum() < len(flat)]
    if not both:
        raise AccuracyError("AUC needs labels of both kinds, 0 and 1: evaluate on more samples")
    return float(np.mean([_binary_auc(scores[:, k], flat[:, k] == 1) for k in both]))


def _decisions(output: Array, labels: Array, probabilities: bool) -> Tuple[Array, Array]:
    """Predicted and true classes, flat, without positions labelled below 0 (padding)."""
    if output.dtype.kind != "f" and output.size == labels.size:
        predicted, true = output.ravel(), labels.ravel()
    elif (axis := class_axis(output, labels)) is not None:
        predicted, true = np.argmax(output, axis=axis).ravel(), labels.ravel()
    elif output.size == len(output) and labels.size == len(labels):
        predicted, true = (output.ravel() > (0.5 if probabilities else 0.0)).astype(np.int64), labels.ravel()
    elif output.shape == labels.shape and output.ndim == 2:
        predicted, true = np.argmax(output, axis=1), np.argmax(labels, axis=1)
    else:
        raise AccuracyError(
            f"labels of shape {shape_text(labels.shape)} are no classes of an output of shape "
            f"{shape_text(output.shape)}: give one class number per sample"
        )
    known = true >= 0
    if not known.any():
        raise AccuracyError("there is nothing to compare: every label is below 0, which means padding")
    return predicted[known].astype(np.int64), true[known].astype(np.int64)


def _accuracy(output: Array, labels: Array, probabilities: bool) -> float:
    predicted, true = _decisions(output, labels, probabilities)
    return float((predicted == true).mean())


def _f1(output: Array, labels: Array, probabilities: bool) -> float:
    """Binary F1 of class 1, or with more classes the mean over all that occur (macro); 0/0 counts as 0."""
    predicted, true = _decisions(output, labels, probabilities)
    occurring = np.union1d(predicted, true)
    classes = [1] if np.isin(occurring, (0, 1)).all() else occurring.tolist()
    scores = []
    for k in classes:
        both, either = (
            int(((predicted == k) & (true == k)).sum()),
            int((predicted == k).sum() + (true == k).sum()),
        )
        scores.append(2 * both / either if either else 0.0)
    return float(np.mean(scores))


def _log_loss(output: Array, labels: Array, probabilities: bool) -> float:
    """Mean negative log likelihood in nats, of probabilities or, through a sigmoid or softmax, of logits."""
    if output.dtype.kind != "f":
        raise AccuracyError("log loss needs scores, not class numbers: use accuracy")
    axis = None if output.size == labels.size else class_axis(output, labels)
    if axis is None:
        if output.size != labels.size or not np.isin(labels, (0, 1)).all():
            raise AccuracyError("log loss needs a score per class, or one score for labels of 0 and 1")
        positive = output.ravel() if probabilities else 1 / (1 + np.exp(-np.clip(output.ravel(), -500, 500)))
        chosen = np.where(labels.ravel() == 1, positive, 1 - positive)
    else:
        scores = np.moveaxis(output, axis, -1).reshape(-1, output.shape[axis])
        if not probabilities:
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores = scores / np.maximum(scores.sum(axis=1, keepdims=True), _LEAST_PROBABILITY)
        true = labels.ravel().astype(np.int64)
        if not (true >= 0).any():
            raise AccuracyError("there is nothing to compare: every label is below 0, which means padding")
        chosen = scores[true >= 0, true[true >= 0]]
    return float(-np.log(np.clip(chosen, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)).mean())


def _rmse(output: Array, labels: Array, probabilities: bool) -> float:
    if output.size != labels.size:
        raise AccuracyError(
            f"rmse needs as many values as labels: {shape_text(output.shape)} and {shape_text(labels.shape)}"
        )
    return float(np.sqrt(np.mean((output.ravel().astype(np.float64) - labels.ravel()) ** 2)))


def _token_error_rate(output: Array, labels: Array, probabilities: bool) -> float:
    """Token sequences: labels [samples, tokens] padded with numbers below 0.

    An output [samples, frames, tokens] is read as CTC does with blank 0; an integer output
    [samples, tokens] is taken as it is, up to its padding. Each token is a word (wer) or a character (cer).
    """
    if labels.ndim != 2:
        raise AccuracyError("error rates need labels [samples, tokens], padded with -1")
    references: List[List[int]] = [row[row >= 0].tolist() for row in labels.astype(np.int64)]
    if output.ndim == 3:
        return error_rate(references, ctc_tokens(output))
    if output.dtype.kind != "f" and output.ndim == 2:
        return error_rate(references, [row[row >= 0].tolist() for row in output.astype(np.int64)])
    raise AccuracyError(
        f"an output of shape {shape_text(output.shape)} is no token sequence: give scores [samples, frames, tokens] "
        f"or token numbers [samples, tokens]"
    )


_Measure = Callable[[Array, Array, bool], float]
#: name → (bigger is better, how it is measured)
_METRICS: Dict[str, Tuple[bool, _Measure]] = {
    "accuracy": (True, _accuracy),
    "auc": (True, _auc),
    "f1": (True, _f1),
    "log_loss": (False, _log_loss),
    "rmse": (False, _rmse),
    "wer": (False, _token_error_rate),
    "cer": (False, _token_error_rate),
}
