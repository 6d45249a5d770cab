"""Weights as integers, and the numbers that scales may have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vernier.package.calibration import StoredWeight
from vernier.tensors import Array

INT8_MAX = 127
FP8_MAX = 448.0

_SCALE_BITS = 8
#: Smaller scales count as none.
_SMALLEST, _DEAD = 2.0**-110, 2.0**-7
#: The smallest positive number of FP16.
FP16_LEAST = 2.0**-24


@dataclass(frozen=True)
class QuantizedWeight(StoredWeight):
    """A weight in INT8, in the shape in which the node reads it.

    values: int8, symmetric, within ±127.
    scales: float32, one per output channel along `axis`, or a single one with shape ().
    bias_correction: float32 per output channel, to be added to the node's output, or None.
    method: how the values were rounded, for the report.
    """

    @classmethod
    def restored(cls, stored: StoredWeight) -> QuantizedWeight:
        """From a calibration cache."""
        return cls(stored.values, stored.scales, stored.axis, stored.bias_correction, stored.method)

    def dequantized(self) -> Array:
        """The float32 weight that the integers stand for."""
        scales = spread(self.scales, self.values.ndim, self.axis)
        return np.asarray(self.values * scales, np.float32)


def spread(scales: Array, ndim: int, axis: int) -> Array:
    """`scales` shaped to broadcast along `axis` of an array with `ndim` dimensions."""
    if scales.ndim == 0:
        return scales
    return scales.reshape([-1 if i == axis else 1 for i in range(ndim)])


def round_scale(scale: npt.ArrayLike, up: bool = True) -> Array:
    """The nearest (or next larger) scale of eight significant bits.

    It is at most 0.8 % larger than asked for, and FP32, BF16 and, from 2**-14 on, FP16 hold it exactly: one
    quantized weight serves graphs of every type, bit for bit. A dead channel's zero becomes a scale
    with room, since TensorRT refuses a scale of zero.
    """
    wanted = np.asarray(scale, np.float64)
    wanted = np.where(wanted < _SMALLEST, _DEAD, wanted)
    _, exponent = np.frexp(wanted)
    step = np.ldexp(1.0, exponent - _SCALE_BITS)
    return np.asarray((np.ceil if up else np.round)(wanted / step) * step, np.float32)


def fp16_scale(scales: Array) -> Array:
    """The scales as FP16 can hold them: below 2**-14 the next larger multiple of 2**-24."""
    held = scales.astype(np.float16).astype(np.float32)
    larger = np.ceil(scales / FP16_LEAST) * FP16_LEAST
    return np.asarray(np.where(held == scales, scales, larger), np.float32)


def fit_fp16(values: Array, scales: Array, axis: int) -> tuple[Array, Array]:
    """The same weight on scales that FP16 holds; channels with very small numbers get coarser."""
    held = fp16_scale(scales)
    if np.array_equal(held, scales):
        return values, scales
    moved = values * spread(scales / held, values.ndim, axis)
    return (np.rint(moved).astype(np.int8) if values.dtype == np.int8 else moved), held
