"""Magnitudes of a stream of numbers in fixed memory, and the INT8 scales that follow from them.

A histogram has 4,096 bins whose width is a power of two, so that a larger number than any before only
merges neighbours: whatever the order and the batches in which numbers come, the counts are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from vernier.builder.lowering.quantized import INT8_MAX, round_scale
from vernier.tensors import Array

BINS = 4096
_BIN_BITS = 12
_CHUNK = 1 << 20
#: Narrower bins would leave float32; magnitudes below 2**-100 count as the smallest.
_MIN_EXPONENT = -100

#: Entropy calibration compares with this many magnitudes of INT8.
_LEVELS = 128
_ENTROPY_STEP = 16
#: Bins are merged until they hold so many numbers on average: KL divergence of a thin histogram is noise.
_FILLED = 16
PERCENTILE = 99.99


class MagnitudeHistogram:
    """Counts of |x| in BINS bins of width 2**exponent / BINS.

    Attributes:
        counts: int64, exact zeros left out.
        exponent: all magnitudes so far are below 2**exponent.
        zeros: how many numbers were exactly zero; they cost nothing whatever the scale.
        nonfinite: how many were NaN or infinite; they are left out.
        peak: the largest magnitude.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.exponent = _MIN_EXPONENT
        self.zeros = 0
        self.nonfinite = 0
        self.peak = 0.0

    @property
    def total(self) -> int:
        return int(self.counts.sum()) + self.zeros

    def add(self, values: Array) -> None:
        """Counts the magnitudes of a float array of any shape."""
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            self._add(np.abs(flat[start : start + _CHUNK]))

    def add_some(self, values: Array, most: int) -> None:
        """The exact peak of `values` [samples, …], and the counts of about `most` of each sample's numbers.

        Which ones depends on the shape of a sample alone: every so-manieth, in steps that meet each channel
        and each place. A sample of no more numbers is counted whole, and so are numbers that are not finite.
        """
        rows = values.reshape(len(values), -1)
        step = rows.shape[1] // most
        while step > 1 and math.gcd(step, rows.shape[1]) > 1:
            step += 1
        peak = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
        if step <= 1 or not np.isfinite(peak):
            self.add(values)
            return
        self.peak = max(self.peak, peak)
        if peak:
            self._widen(int(np.frexp(peak)[1]))
        self.add(rows[:, ::step])

    def merge(self, other: MagnitudeHistogram) -> None:
        """Adds what `other` has counted; the order makes no difference."""
        self._widen(other.exponent)
        self.counts += _coarser(other.counts, self.exponent - other.exponent)
        self.zeros += other.zeros
        self.nonfinite += other.nonfinite
        self.peak = max(self.peak, other.peak)

    def _add(self, magnitudes: Array) -> None:
        peak = float(magnitudes.max(initial=0.0))
        if not np.isfinite(peak):
            finite = magnitudes[np.isfinite(magnitudes)]
            self.nonfinite += magnitudes.size - finite.size
            self._add(finite)
            return
        if peak == 0.0:
            self.zeros += magnitudes.size
            return
        self.peak = max(self.peak, peak)
        self._widen(int(np.frexp(peak)[1]))
        index = (magnitudes * np.float32(2.0 ** (_BIN_BITS - self.exponent))).astype(np.intp)
        zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
        self.zeros += zeros
        self.counts += np.bincount(index, minlength=BINS)
        self.counts[0] -= zeros

    def _widen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent

    @property
    def width(self) -> float:
        """The width of a bin."""
        return float(2.0 ** (self.exponent - _BIN_BITS))

    def state(self) -> dict[str, Array]:
        """What `restore` takes, as arrays for an .npz file."""
        facts = np.array([self.exponent, self.zeros, self.nonfinite], np.int64)
        return {"counts": self.counts, "facts": facts, "peak": np.array(self.peak)}

    @classmethod
    def restore(cls, state: Mapping[str, Array]) -> MagnitudeHistogram:
        """KeyError or ValueError when `state` is none."""
        histogram = cls()
        histogram.counts = np.asarray(state["counts"], np.int64)
        histogram.exponent, histogram.zeros, histogram.nonfinite = (int(v) for v in state["facts"])
        histogram.peak = float(state["peak"])
        if histogram.counts.shape != (BINS,):
            raise ValueError("not a histogram")
        return histogram


def _coarser(counts: Array, doublings: int) -> Array:
    """The counts in bins that are 2**doublings as wide."""
    merged = counts.reshape(-1, 1 << min(doublings, _BIN_BITS)).sum(axis=1)
    return np.pad(merged, (0, BINS - merged.size))


def minmax_scale(histogram: MagnitudeHistogram) -> float:
    """The largest magnitude becomes 127: nothing is clipped."""
    return float(round_scale(histogram.peak / INT8_MAX))


def percentile_scale(histogram: MagnitudeHistogram, percentile: float = PERCENTILE) -> float:
    """All but the largest (100 − percentile) % of the numbers stay unclipped."""
    if not histogram.peak:
        return minmax_scale(histogram)
    below = histogram.zeros + np.cumsum(histogram.counts)
    edge = int(np.searchsorted(below, histogram.total * percentile / 100.0)) + 1
    return float(round_scale(min(edge * histogram.width, histogram.peak) / INT8_MAX))


def errors(histogram: MagnitudeHistogram, scales: Array) -> Array:
    """Mean squared error of quantizing the counted numbers with each of `scales`.

    Numbers are taken to be spread evenly inside their bin, and the squared distance to the nearest
    level is integrated in closed form: from 0 to u levels it is n/12 + (u − n)³/3, n the nearest level.
    """
    edges = np.arange(BINS + 1, dtype=np.float64) * histogram.width
    u = edges[None, :] / np.asarray(scales, np.float64)[:, None]
    nearest = np.minimum(np.rint(u), INT8_MAX)
    integral = nearest / 12.0 + (u - nearest) ** 3 / 3.0
    per_bin = np.diff(integral, axis=1) * np.asarray(scales, np.float64)[:, None] ** 3 / histogram.width
    error: Array = per_bin @ histogram.counts.astype(np.float64) / max(histogram.total, 1)
    return error


def mse_scale(histogram: MagnitudeHistogram) -> float:
    """The scale with the least mean squared error, rounding and clipping together."""
    if not histogram.peak:
        return minmax_scale(histogram)
    largest = histogram.peak / INT8_MAX
    shares = np.geomspace(1.0, 1 / 64, 97)
    coarse = shares[int(np.argmin(errors(histogram, largest * shares)))]
    fine = np.linspace(coarse * 0.94, min(coarse * 1.06, 1.0), 25)
    candidates = np.unique(round_scale(largest * np.append(fine, coarse)).astype(np.float64))
    return float(candidates[int(np.argmin(errors(histogram, candidates)))])


def entropy_scale(histogram: MagnitudeHistogram) -> float:
    """The scale whose 128 magnitudes lose the least information (Migacz, GTC 2017).

    For each threshold: P is the histogram up to it with everything beyond in its last bin; Q is the
    histogram up to it without what lies beyond, merged to 128 magnitudes and spread over P's
    non-empty bins. The threshold with the least KL(P‖Q) wins.
    """
    if not histogram.peak:
        return minmax_scale(histogram)
    counts = histogram.counts.astype(np.float64)
    merged = 1
    while counts.sum() < _FILLED * counts.size and counts.size > 2 * _LEVELS:
        counts, merged = counts.reshape(-1, 2).sum(axis=1), merged * 2
    if counts.sum() < _FILLED * counts.size:
        return minmax_scale(histogram)  # a few hundred numbers say nothing about a distribution
    last = int(np.flatnonzero(counts)[-1]) + 1
    best, least = last, np.inf
    step = max(1, _ENTROPY_STEP // merged)
    for stop in [*range(min(_LEVELS, last), last, step), last]:
        divergence = _divergence(counts[:stop], counts[stop:].sum())
        if divergence < least:
            best, least = stop, divergence
    return float(round_scale(min(best * merged * histogram.width, histogram.peak) / INT8_MAX))


def _divergence(inside: Array, beyond: float) -> float:
    reference = inside.copy()
    reference[-1] += beyond
    bounds = np.unique(np.rint(np.linspace(0, inside.size, min(_LEVELS, inside.size) + 1)).astype(np.intp))
    sums = np.add.reduceat(inside, bounds[:-1])
    filled = reference > 0
    cells = np.add.reduceat(filled.astype(np.float64), bounds[:-1])
    merged = np.repeat(sums / np.maximum(cells, 1.0), np.diff(bounds))
    p = reference[filled] / reference.sum()
    # Only the last bin can be empty here, when all of it came from beyond: a tiny share keeps it finite.
    q = np.maximum(merged[filled] / max(merged[filled].sum(), 1.0), 1e-9)
    return float(np.sum(p * np.log(p / q)))
