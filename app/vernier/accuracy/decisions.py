"""How often two models decide differently, estimated from margins: no flip among a few hundred is not 'never'."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

from vernier.accuracy.tasks import Task, class_axis
from vernier.tensors import Array

#: Probabilities are compared as logits; below this they are all as good as zero.
_LEAST_PROBABILITY = 1e-9


def flip_rate(task: Task, reference: Array, candidate: Array, labels: Array) -> Optional[float]:
    """The expected share of decisions that differ; None where the task has no decisions or outputs are not finite.

    A decision flips when the two best scores approach each other by more than they are apart.
    Changes are taken to be independent of margins (which they are about, for logits), so that the
    change of every decision is held against the margin of every other: with n decisions that estimates
    rates far below 1/n.
    """
    if task.metric not in ("accuracy", "f1") or reference.dtype.kind != "f":
        return None
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        return None
    found = _differences(task, reference, candidate, labels)
    if found is None:
        return None
    ahead, ahead_now = found
    # How far each decision moved towards its border, wherever that is.
    moved = np.sort(np.where(ahead < 0, ahead_now - ahead, ahead - ahead_now))
    over = moved.size - np.searchsorted(moved, np.abs(ahead), side="right")
    return float(np.mean(over / moved.size))


def decisions(task: Task, labels: Array) -> int:
    """How many decisions the labels judge; labels below 0 are padding."""
    return int(np.sum(labels >= 0)) if task.metric in ("accuracy", "f1") else len(labels)


def _differences(
    task: Task, reference: Array, candidate: Array, labels: Array
) -> Optional[Tuple[Array, Array]]:
    """By how much the reference's best score is ahead of its second, in both; flat, one value per decision."""
    r, c = (np.asarray(a, dtype=np.float64) for a in (reference, candidate))
    axis = class_axis(reference, labels)
    if axis is None:
        if r.size != len(r):
            return None
        scores = (_logit(a) if task.probabilities else a for a in (r, c))
        r_flat, c_flat = (a.ravel() for a in scores)
        return r_flat, c_flat
    if task.probabilities:
        r, c = (np.log(np.maximum(a, _LEAST_PROBABILITY)) for a in (r, c))
    r, c = (np.moveaxis(a, axis, -1).reshape(-1, reference.shape[axis]) for a in (r, c))
    known = labels.ravel() >= 0
    r, c = r[known], c[known]
    best = np.argsort(-r, axis=1, kind="stable")[:, :2]
    ahead = tuple(np.subtract(*np.take_along_axis(a, best, axis=1).T) for a in (r, c))
    return ahead[0], ahead[1]


def _logit(probability: Array) -> Array:
    inside = np.clip(probability, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    return np.asarray(np.log(inside) - np.log1p(-inside))
