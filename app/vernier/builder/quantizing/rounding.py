"""Rounding a weight matrix to INT8: to the nearest, with MSE-optimal scales, or with an eye on its inputs.

Matrices have one row per output channel and one column per input of the dot product. The GPTQ
algorithm is that of Frantar et al. 2022 (arXiv:2210.17323), section 3.
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from vernier.builder.lowering.quantized import INT8_MAX, round_scale
from vernier.tensors import Array

#: MSE-optimal scales are looked for between this share of the largest magnitude and all of it.
_SHRINK = np.linspace(1.0, 0.5, 41)
_BLOCK = 128
#: Rows are searched so many elements at a time: what a step needs besides the weight stays in the cache.
_CHUNK = 1 << 18
_DAMPING = 0.01


def to_integers(weight: Array, scales: Array) -> Array:
    """The nearest multiples of the scales (one per row, or a single one), clipped to ±127."""
    steps: Array = np.rint(weight / _column(scales))
    clipped: Array = np.clip(steps, -INT8_MAX, INT8_MAX)
    return clipped.astype(np.int8)


def _column(scales: Array) -> Array:
    return scales if scales.ndim == 0 else scales[:, None]


def largest_scales(weight: Array, per_row: bool) -> Array:
    """The largest magnitude becomes 127."""
    peak = np.abs(weight).max(axis=1 if per_row else None, initial=0.0)
    return round_scale(peak / INT8_MAX)


def best_scales(weight: Array, per_row: bool, importance: Array | None = None) -> Array:
    """The scales with the least squared rounding and clipping error.

    Args:
        importance: weight of each column's error, the mean square of its input; equal where None.
    """
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    if per_row and len(weight) > step:
        parts = [slice(at, at + step) for at in range(0, len(weight), step)]
        return np.concatenate(
            [best_scales(weight[p], True, None if importance is None else importance[p]) for p in parts]
        )
    start = largest_scales(weight, per_row)
    chosen = start.copy()
    least = np.full(start.shape, np.inf)
    for share in _SHRINK:
        scales = round_scale(start * share, up=False)
        error = np.square(to_integers(weight, scales) * _column(scales) - weight)
        if importance is not None:
            error = error * importance
        total = error.sum(axis=1 if per_row else None, dtype=np.float64)
        better = total < least
        least = np.where(better, total, least)
        chosen = np.where(better, scales, chosen)
    return chosen.astype(np.float32)


def gptq(weight: Array, scales: Array, hessian: Array) -> Array:
    """Rounds column by column and lets the columns still to come make up for each error.

    Args:
        weight: [groups, rows, columns]; groups are independent.
        scales: [groups, rows], or a single one.
        hessian: [groups, columns, columns], Xᵀ·X of the inputs that the weight is multiplied with.

    Returns:
        int8 of the weight's shape.

    Raises:
        numpy.linalg.LinAlgError: a Hessian is not positive definite even after damping.
    """
    inverse, order = _inverse_factor(hessian)
    left = np.take_along_axis(weight, order[:, None, :], axis=2).astype(np.float32)
    scale = np.broadcast_to(scales, weight.shape[:2]).astype(np.float32)
    columns = weight.shape[2]
    values = np.empty(weight.shape, np.int8)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block = left[:, :, start:stop]
        errors = np.empty_like(block)
        for column in range(stop - start):
            factor = inverse[:, start + column, start + column : stop]
            steps = np.clip(np.rint(block[:, :, column] / scale), -INT8_MAX, INT8_MAX)
            values[:, :, start + column] = steps
            error = (block[:, :, column] - steps * scale) / factor[:, :1]
            block[:, :, column:] -= error[:, :, None] * factor[:, None, :]
            errors[:, :, column] = error
        left[:, :, stop:] -= errors @ inverse[:, start:stop, stop:]
    restored = np.empty_like(values)
    np.put_along_axis(restored, np.broadcast_to(order[:, None, :], values.shape), values, axis=2)
    return restored


def _inverse_factor(hessian: Array) -> tuple[Array, Array]:
    """U with (H + damping)⁻¹ = Uᵀ·U, for the columns sorted by the size of their inputs, and that order.

    What is rounded early is made up for by all the others, so the columns that matter most go first.
    """
    diagonal = np.diagonal(hessian, axis1=1, axis2=2).astype(np.float64)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    # Twice as fast, and enough after damping; small matrices can afford the care.
    kind = np.float32 if order.shape[1] > 256 else np.float64
    group = np.arange(len(order))[:, None, None]
    damped: Array = hessian[group, order[:, :, None], order[:, None, :]].astype(kind)
    index = np.arange(order.shape[1])
    mean = diagonal.mean(axis=1, keepdims=True)
    damped[:, index, index] += _DAMPING * np.where(mean > 0, mean, 1.0)
    # OpenBLAS's threads wait for one another in a busy loop: on a machine with other work, a factorization
    # of this size takes 200 times as long with two threads as with one.
    with threadpool_limits(1, user_api="blas"):
        factor = np.linalg.cholesky(np.linalg.inv(damped)).transpose(0, 2, 1)
    return np.ascontiguousarray(factor, np.float32), order
