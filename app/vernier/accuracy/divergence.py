"""How far a candidate's outputs are from the reference's, sample by sample and over the whole set."""

from __future__ import annotations

import re
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np

from vernier.accuracy.ranking import kendall, ndcg, top_agreement
from vernier.errors import AccuracyError
from vernier.tensors import Array, shape_text

DISTANCES: Tuple[str, ...] = ("rel_l2", "max_abs", "rel_spread")
SIMILARITIES: Tuple[str, ...] = ("cosine", "equal", "kendall", "ndcg")
_TOP = re.compile(r"top([1-9][0-9]*)")
_STATISTIC = re.compile(r"mean|min|max|p(\d{1,2}(?:\.\d+)?)")
#: Rows are compared in pieces of about so many elements, so that memory stays bounded.
_PIECE = 1 << 20
#: A reference that hardly varies is measured by its magnitude instead, from this share downwards.
_LEAST_SPREAD = 1e-3
#: Rank agreement is left out of the overview for more elements than this; budgets may still ask for it.
_RANKED_ELEMENTS = 2_000_000


def is_divergence(metric: str) -> bool:
    """Whether `metric` compares a candidate with the reference, no labels needed."""
    return metric in DISTANCES or is_similarity(metric)


def is_similarity(metric: str) -> bool:
    return metric in SIMILARITIES or _TOP.fullmatch(metric) is not None


def is_statistic(statistic: str) -> bool:
    """mean, min, max, or a percentile such as p99 or p99.9."""
    return _STATISTIC.fullmatch(statistic) is not None


class Comparison:
    """One output of the reference and of the candidate, compared sample by sample.

    Args:
        reference, candidate: numeric or bool, of one shape, the first axis the sample.
        spread: see `spread_of`; None takes it from this very reference. Give the spread of a larger
            set when only a few samples are at hand, as the live monitor does.

    Raises:
        AccuracyError: nothing to compare, or shapes differ.
    """

    def __init__(self, reference: Array, candidate: Array, spread: Optional[float] = None) -> None:
        reference, candidate = np.asarray(reference), np.asarray(candidate)
        if reference.shape != candidate.shape:
            raise AccuracyError(
                f"the reference has shape {shape_text(reference.shape)}, the candidate "
                f"{shape_text(candidate.shape)}: compare outputs of the same inputs"
            )
        if reference.size == 0:
            raise AccuracyError("there is nothing to compare: give at least one sample")
        for array in (reference, candidate):
            if array.dtype.kind not in "fiub":
                raise AccuracyError(f"outputs of type {array.dtype.name} cannot be compared")
        self.reference = np.atleast_1d(reference)
        self.candidate = np.atleast_1d(candidate)
        self.samples = len(self.reference)
        self._spread = spread
        sums: List[List[Array]] = [[] for _ in range(7)]
        for r, c in _pieces(self.reference, self.candidate):
            for kept, row in zip(sums, _row_sums(r, c)):
                kept.append(row)
        finite, self._error2, self._ref2, self._cand2, self._dot, self._max_abs, self._equal = (
            np.concatenate(rows) for rows in sums
        )
        self.finite = finite.astype(bool)

    @property
    def values_per_sample(self) -> int:
        return self.reference.size // self.samples

    def per_sample(self, metric: str) -> Array:
        """The metric of each sample, float64 [samples]. Raises AccuracyError when it does not apply."""
        if metric in ("kendall", "ndcg") or _TOP.fullmatch(metric):
            if self.reference.ndim < 2 or self.reference.shape[-1] < 2:
                raise AccuracyError(
                    f"{metric} orders the values along the last axis, and here each sample has one value: "
                    f"use kendall or ndcg over all samples, without a statistic such as .p99"
                )
            values = self._ranked(metric)
        elif metric == "rel_l2":
            values = _ratio(np.sqrt(self._error2), np.sqrt(self._ref2))
        elif metric == "rel_spread":
            spread = spread_of(self.reference) if self._spread is None else self._spread
            values = _ratio(np.sqrt(self._error2), np.full(self.samples, spread))
        elif metric == "max_abs":
            values = self._max_abs
        elif metric == "cosine":
            values = _cosine(self._dot, self._ref2, self._cand2)
        elif metric == "equal":
            values = self._equal
        else:
            raise AccuracyError(f"'{metric}' is no metric: use {', '.join(DISTANCES + SIMILARITIES)} or top1")
        usable = self.finite & ~np.isnan(values)
        return np.where(usable, values, np.inf if metric in DISTANCES else -np.inf)

    def value(self, metric: str, statistic: Optional[str] = None) -> float:
        """The metric over the whole set, or a statistic of the samples' values.

        Without a statistic, rel_l2 and cosine take all samples as one vector, max_abs is the largest,
        kendall and ndcg of one value per sample rank the samples among themselves, and everything else
        is the mean over samples. Percentiles are values that occur: the next worse one, never between.
        """
        if statistic is not None:
            return statistic_of(self.per_sample(metric), statistic)
        if not self.finite.all():
            return float("inf") if metric in DISTANCES else float("-inf")
        if metric == "rel_l2":
            return float(
                _ratio(np.sqrt(self._error2.sum(keepdims=True)), np.sqrt(self._ref2.sum(keepdims=True)))[0]
            )
        if metric == "cosine":
            return float(_cosine(*(s.sum(keepdims=True) for s in (self._dot, self._ref2, self._cand2)))[0])
        if metric in ("kendall", "ndcg") and self.values_per_sample == 1:
            measure = kendall if metric == "kendall" else ndcg
            lists = (a.reshape(1, -1).astype(np.float64) for a in (self.reference, self.candidate))
            return float(measure(*lists)[0])
        values = self.per_sample(metric)
        return float(values.max() if metric == "max_abs" else values.mean())

    def overview(self) -> Dict[str, float]:
        """Every metric that applies to this output; keys such as `rel_l2`, `rel_l2.p99`, `top1`."""
        found = {
            "rel_l2": self.value("rel_l2"),
            "max_abs": self.value("max_abs"),
            "cosine": self.value("cosine"),
            "equal": self.value("equal"),
            "non_finite": float((~self.finite).sum()),
        }
        for metric in ("rel_l2", "rel_spread", "max_abs"):
            values = self.per_sample(metric)
            found.update({f"{metric}.{s}": statistic_of(values, s) for s in ("p50", "p99", "max")})
        listed = self.reference.ndim >= 2 and self.reference.shape[-1] >= 2
        if listed:
            found["top1"] = self.value("top1")
            if self.reference.shape[-1] > 5:
                found["top5"] = self.value("top5")
        if self.reference.size <= _RANKED_ELEMENTS and (
            listed or (self.values_per_sample == 1 and self.samples > 1)
        ):
            found["kendall"] = self.value("kendall")
            found["ndcg"] = self.value("ndcg")
        return found

    def _ranked(self, metric: str) -> Array:
        width = self.reference.shape[-1]
        top = _TOP.fullmatch(metric)
        if top and int(top.group(1)) >= width:
            raise AccuracyError(f"{metric} of {width} values always agrees: choose a smaller number")
        found = []
        for r, c in _pieces(self.reference, self.candidate):
            usable = _finite(r, c)
            lists = [np.where(usable[:, None], a, 0.0).reshape(-1, width) for a in (r, c)]
            if top:
                values = top_agreement(lists[0], lists[1], int(top.group(1)))
            else:
                values = kendall(*lists) if metric == "kendall" else ndcg(*lists)
            found.append(values.reshape(len(r), -1).mean(axis=1))
        return np.concatenate(found)


def per_sample(metric: str, reference: Array, candidate: Array, spread: Optional[float] = None) -> Array:
    """The metric of each sample, float64 [samples]; see `Comparison`."""
    return Comparison(reference, candidate, spread).per_sample(metric)


def compare_outputs(reference: Array, candidate: Array) -> Dict[str, float]:
    """Every metric that applies, over the set and as quantiles of the samples; see `Comparison`."""
    return Comparison(reference, candidate).overview()


def statistic_of(values: Array, statistic: str) -> float:
    """mean, min, max or a percentile of per-sample values.

    A percentile from 50 up takes the next higher value that occurs, one below takes the next lower, so a
    budget errs towards refusal. `p99` of up to 100 samples is therefore the largest.
    """
    match = _STATISTIC.fullmatch(statistic)
    if match is None:
        raise AccuracyError(f"'{statistic}' is no statistic: use mean, min, max or a percentile such as p99")
    if values.size == 0:
        raise AccuracyError("there is nothing to compare: give at least one sample")
    if match.group(1) is None:
        return float(
            values.mean() if statistic == "mean" else values.min() if statistic == "min" else values.max()
        )
    position = float(match.group(1)) / 100 * (values.size - 1)
    # 0.99 · 100 is 99.00000000000001 or so: a hair above an index is that index.
    index = np.ceil(position - 1e-9) if position * 2 >= values.size - 1 else np.floor(position + 1e-9)
    return float(np.sort(values)[int(index)])


def spread_of(reference: Array) -> float:
    """How far the reference's answers lie from one another: the root mean square distance to their mean.

    An error as large as the spread turns an answer into any other. Unlike a relative error it is not
    inflated for answers near zero, nor hidden by an offset that all answers share.
    """
    reference = np.atleast_1d(reference)
    count, squares = 0, 0.0
    total = np.zeros(reference.size // max(1, len(reference)))
    for rows in _finite_rows(reference):
        count += len(rows)
        squares += float(np.sum(rows * rows))
        total += rows.sum(axis=0)
    if count < 2:
        return float(np.sqrt(squares))
    mean = total / count
    distances = sum(float(np.sum((rows - mean) ** 2)) for rows in _finite_rows(reference))
    return float(max(np.sqrt(distances / count), _LEAST_SPREAD * np.sqrt(squares / count)))


def _finite_rows(array: Array) -> Iterator[Array]:
    for rows, _ in _pieces(array, array):
        yield rows[np.isfinite(rows).all(axis=1)]


def _pieces(reference: Array, candidate: Array) -> Iterator[Tuple[Array, Array]]:
    """Runs of samples as float64 [rows, values]."""
    rows = max(1, _PIECE * len(reference) // max(1, reference.size))
    for start in range(0, len(reference), rows):
        pair = (array[start : start + rows] for array in (reference, candidate))
        r, c = (array.reshape(len(array), -1).astype(np.float64) for array in pair)
        yield r, c


def _finite(r: Array, c: Array) -> Array:
    return np.asarray(np.isfinite(r).all(axis=1) & np.isfinite(c).all(axis=1))


def _row_sums(r: Array, c: Array) -> Tuple[Array, ...]:
    finite = _finite(r, c)
    if not finite.all():
        r, c = (np.where(finite[:, None], a, 0.0) for a in (r, c))
    with np.errstate(over="ignore", invalid="ignore"):
        error = c - r
        dots = [np.einsum("ij,ij->i", a, b) for a, b in ((error, error), (r, r), (c, c), (r, c))]
    return (finite, *dots, np.abs(error).max(axis=1), (error == 0).mean(axis=1))


def _ratio(error: Array, scale: Array) -> Array:
    """error / scale; 0/0 is 0 (equal), and anything else over 0 is infinite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(error == 0, 0.0, error / scale)


def _cosine(dot: Array, ref2: Array, cand2: Array) -> Array:
    """The cosine of the angle; two zero vectors are alike, one zero vector is like nothing."""
    norms = np.sqrt(ref2) * np.sqrt(cand2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(
            np.where(norms > 0, np.clip(dot / norms, -1.0, 1.0), (ref2 == cand2).astype(np.float64))
        )
