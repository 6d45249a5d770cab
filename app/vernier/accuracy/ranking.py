"""Agreement of two rankings, for many lists at once: rows are lists, columns the ranked things.

Everything is vectorized over the rows, in O(n log n) per list, since the live monitor runs it too.
"""

from __future__ import annotations

import numpy as np

from vernier.tensors import Array


def top_agreement(reference: Array, candidate: Array, k: int) -> Array:
    """The share of the candidate's k best that the reference counts among its own k best.

    Ties are settled against the candidate (of equally good things it is taken to have meant the worse)
    but not against the reference: each of its tied best is a right answer.

    Args:
        reference, candidate: float64 [lists, things], finite; 0 < k < things.
    """
    least = np.partition(reference, -k, axis=1)[:, -k]
    worst_first = np.lexsort((reference, -candidate), axis=-1)
    chosen = np.take_along_axis(reference, worst_first[:, :k], axis=1)
    return np.asarray((chosen >= least[:, None]).mean(axis=1))


def kendall(reference: Array, candidate: Array) -> Array:
    """Kendall's tau-b per row, as W. Knight (1966) counts it: sort by one, count inversions of the other.

    A list that is constant in both is in agreement (1), one that is constant in one only is not (0).
    """
    things = reference.shape[1]
    order = np.lexsort((candidate, reference), axis=-1)
    r = np.take_along_axis(reference, order, axis=1)
    c = np.take_along_axis(candidate, order, axis=1)
    c_sorted = np.sort(candidate, axis=1)
    pairs = things * (things - 1) / 2
    r_ties = _tied_pairs(r[:, 1:] != r[:, :-1])
    c_ties = _tied_pairs(c_sorted[:, 1:] != c_sorted[:, :-1])
    both_ties = _tied_pairs((r[:, 1:] != r[:, :-1]) | (c[:, 1:] != c[:, :-1]))
    agreement = pairs - r_ties - c_ties + both_ties - 2 * _inversions(_dense_ranks(c))
    scale = np.sqrt((pairs - r_ties) * (pairs - c_ties))
    both_constant = (r_ties == pairs) & (c_ties == pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(scale > 0, agreement / scale, both_constant.astype(np.float64)))


def ndcg(reference: Array, candidate: Array) -> Array:
    """NDCG of the candidate's order when the reference's scores are the gains, per row.

    Gains are linear, discounts 1/log2(1 + rank), ties of the candidate share the mean of their places
    (McSherry and Najork 2008, as scikit-learn's ndcg_score). A list with negative scores is shifted so
    that its least gain is 0; a list without any gain has nothing to rank and is in agreement.
    """
    rows, things = reference.shape
    gains = reference - np.minimum(reference.min(axis=1, keepdims=True), 0.0)
    discounts = 1.0 / np.log2(np.arange(2, things + 2))
    ideal = -np.sort(-gains, axis=1) @ discounts
    order = np.argsort(-candidate, axis=1, kind="stable")
    ranked = np.take_along_axis(candidate, order, axis=1)
    starts = np.ones((rows, things), dtype=bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    group = np.cumsum(starts.ravel()) - 1
    mean_gain = np.bincount(group, np.take_along_axis(gains, order, axis=1).ravel()) / np.bincount(group)
    places = np.bincount(group, np.tile(discounts, rows))
    row_of_group = np.flatnonzero(starts.ravel()) // things
    found = np.bincount(row_of_group, mean_gain * places, minlength=rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(ideal > 0, found / ideal, 1.0)


def _tied_pairs(differs: Array) -> Array:
    """How many pairs of a sorted row are equal, from [rows, things − 1] flags 'differs from the one before'."""
    rows, things = differs.shape[0], differs.shape[1] + 1
    starts = np.ones((rows, things), dtype=bool)
    starts[:, 1:] = differs
    positions = np.flatnonzero(starts.ravel())
    lengths = np.diff(np.append(positions, rows * things)).astype(np.float64)
    return np.bincount(positions // things, lengths * (lengths - 1) / 2, minlength=rows)


def _dense_ranks(values: Array) -> Array:
    """Ranks from 0 per row, equal values having equal ranks; int64 of the same shape."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    steps = np.zeros(values.shape, dtype=np.int64)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ranks = np.empty_like(steps)
    np.put_along_axis(ranks, order, np.cumsum(steps, axis=1), axis=1)
    return ranks


def _inversions(ranks: Array) -> Array:
    """Pairs per row that stand in descending order: [rows, things] of int64 from 0 to things − 1.

    From the highest bit down, elements whose higher bits agree stand together in their first order.
    A pair is inverted at the one bit where it first differs, so each level counts ones before zeros.
    """
    rows, things = ranks.shape
    bits = max(1, (things - 1).bit_length())
    keys = (ranks + (np.arange(rows, dtype=np.int64) << bits)[:, None]).ravel()
    found = np.zeros(rows)
    for bit in reversed(range(bits)):
        group = keys >> (bit + 1)
        is_one = (keys >> bit) & 1
        ones_before = np.cumsum(is_one) - is_one
        starts = np.flatnonzero(np.diff(group, prepend=group[0] - 1))
        lengths = np.diff(np.append(starts, keys.size))
        within = ones_before - np.repeat(ones_before[starts], lengths)
        zeros = is_one == 0
        found += np.bincount(keys[zeros] >> bits, within[zeros], minlength=rows)
        keys = keys[np.argsort(keys >> bit, kind="stable")]
    return found
