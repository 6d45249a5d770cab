"""Rounding a weight matrix to INT8: to the nearest, with MSE-optimal scales, or with an eye on its inputs.

Matrices have one row per output channel and one column per input of the dot product. The GPTQ
algorithm is that of Frantar et al. 2022 (arXiv:2210.17323), section 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from app.build.quantized import INT8_MAX, round_scale

Matrix = npt.NDArray[np.float32]

#: MSE-optimal scales are looked for between this share of the largest magnitude and all of it.
_SHRINK = np.linspace(1.0, 0.5, 41)
_BLOCK = 128
_DAMPING = 0.01


def to_integers(weight: Matrix, scales: Matrix) -> npt.NDArray[np.int8]:
    """The nearest multiples of the scales (one per row, or a single one), clipped to ±127."""
    steps = np.rint(weight / _column(scales))
    return np.clip(steps, -INT8_MAX, INT8_MAX).astype(np.int8)


def _column(scales: Matrix) -> Matrix:
    return scales if scales.ndim == 0 else scales[:, None]


def largest_scales(weight: Matrix, per_row: bool) -> Matrix:
    """The largest magnitude becomes 127."""
    peak = np.abs(weight).max(axis=1 if per_row else None, initial=0.0)
    return round_scale(peak / INT8_MAX)


def best_scales(weight: Matrix, per_row: bool, importance: Matrix | None = None) -> Matrix:
    """The scales with the least squared rounding and clipping error.

    Args:
        importance: weight of each column's error, the mean square of its input; equal where None.
    """
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


def gptq(weight: Matrix, scales: Matrix, hessian: Matrix) -> npt.NDArray[np.int8]:
    """Rounds column by column and lets the columns still to come make up for each error.

    Args:
        weight: [rows, columns].
        scales: one per row, or a single one.
        hessian: [columns, columns], Xᵀ·X of the inputs that the weight is multiplied with.

    Returns:
        int8 [rows, columns]. Columns whose input is always zero are rounded to the nearest.

    Raises:
        numpy.linalg.LinAlgError: the Hessian is not positive definite even after damping.
    """
    inverse, order = _inverse_factor(hessian)
    left = weight[:, order].astype(np.float32)
    scale = np.broadcast_to(scales, weight.shape[:1]).astype(np.float32)
    values = np.empty(weight.shape, np.int8)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        block = left[:, start:stop]
        errors = np.empty_like(block)
        for column in range(stop - start):
            factor = inverse[start + column, start + column : stop]
            steps = np.clip(np.rint(block[:, column] / scale), -INT8_MAX, INT8_MAX)
            values[:, start + column] = steps
            error = (block[:, column] - steps * scale) / factor[0]
            block[:, column:] -= error[:, None] * factor[None, :]
            errors[:, column] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    restored = np.empty_like(values)
    restored[:, order] = values
    return restored


def _inverse_factor(hessian: Matrix) -> tuple[Matrix, npt.NDArray[np.intp]]:
    """U with (H + damping)⁻¹ = Uᵀ·U, for the columns sorted by the size of their inputs, and that order.

    What is rounded early is made up for by all the others, so the columns that matter most go first.
    """
    diagonal = np.diag(hessian).astype(np.float64)
    order = np.argsort(-diagonal, kind="stable")
    # Twice as fast, and enough after damping; small matrices can afford the care.
    damped = hessian[np.ix_(order, order)].astype(np.float32 if len(order) > 1024 else np.float64)
    index = np.arange(len(order))
    damped[index, index] += _DAMPING * (float(diagonal.mean()) or 1.0)
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T, np.float32), order
