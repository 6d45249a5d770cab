"""How good a ranking is: area under the ROC curve and log loss, with NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def auc(label: Array, score: Array) -> float:
    """The chance that a clicked item scores above one not clicked, ties counting half.

    The Mann-Whitney U statistic over its maximum. `label` and `score` have shape [n].

    Raises:
        ValueError: without both a clicked and an unclicked sample nothing can be compared.
    """
    positives = int((label == 1).sum())
    negatives = len(label) - positives
    if not positives or not negatives:
        raise ValueError("AUC needs samples of both labels")
    _, group, sizes = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2
    rank_sum = float(mean_rank[group][label == 1].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def log_loss(label: Array, probability: Array) -> float:
    """Mean negative log likelihood in nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(np.asarray(probability, dtype=np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(label == 1, np.log(p), np.log1p(-p))))
