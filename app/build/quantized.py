"""Weights as integers, and the numbers that scales may have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.package.calibration import StoredWeight
from app.tensors import Array

INT8_MAX = 127
FP8_MAX = 448.0

#: Scales are kept to this many significant bits …
_SCALE_BITS = 8
#: … and at least the smallest positive number of FP16.
_SCALE_MIN = 2.0**-24


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
    """The nearest (or next larger) scale that FP32, FP16 and BF16 all hold exactly.

    Eight significant bits make a scale at most 0.8 % larger than asked for, and one quantized weight
    then serves graphs of every type, bit for bit. Zero (a dead channel) becomes the smallest scale:
    TensorRT refuses a scale of zero.
    """
    wanted = np.clip(np.asarray(scale, np.float64), _SCALE_MIN, None)
    _, exponent = np.frexp(wanted)
    # Below 2**-14 FP16 has fewer bits: multiples of 2**-24 are all there is.
    step = np.maximum(np.ldexp(1.0, exponent - _SCALE_BITS), _SCALE_MIN)
    rounded = (np.ceil if up else np.round)(wanted / step) * step
    return np.asarray(np.maximum(rounded, _SCALE_MIN), np.float32)
