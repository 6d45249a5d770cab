"""What half-precision types may lose of the values inside a model: their magnitudes, seen while data runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto

from vernier.builder.graphs.graph import GraphView
from vernier.builder.nodes.floats import MOVEMENT
from vernier.tensors import Array

#: Largest whole number up to which every whole number is exact.
_EXACT_BITS = {"fp16": 11, "bf16": 8}

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

#: A tiny input that becomes zero turns into an infinity here.
_DIVIDES = {"Div": 1, "Log": 0, "Reciprocal": 0}

#: Columns of what is seen: one row for each value.
_PEAK, _LEAST, _SIZE, _INEXACT = 0, 1, 2, {"fp16": 3, "bf16": 4}
_UNSEEN = (0.0, np.inf, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ObservedRange:
    """One value over all samples.

    peak, least: the largest and, of divisors, the smallest non-zero finite magnitude.
    size: the most numbers at once.
    inexact: types in which a whole number was not exact.
    """

    peak: float
    least: float
    size: int
    inexact: frozenset[str]


class RangeObserver:
    """The float values of a model's outermost graph that are computed, in graph order.

    Attributes:
        names: the values.
        divisors: those that something is divided by, or whose logarithm is taken.
    """

    def __init__(self, model: ModelProto) -> None:
        view = GraphView(model)
        found = [
            name
            for node in view.nodes
            for name in (*node.input, *node.output)
            if name and view.is_float(name) and name not in view.constants
        ]
        self.names = tuple(dict.fromkeys(found))
        self.divisors = frozenset(
            node.input[_DIVIDES[node.op_type]]
            for node in view.nodes
            if node.op_type in _DIVIDES and len(node.input) > _DIVIDES[node.op_type]
        )
        self._whole = _whole_numbers(view)

    def nothing_yet(self) -> Array:
        """What was seen before the first sample."""
        return np.tile(np.array(_UNSEEN), (len(self.names), 1))

    def observe(self, values: Mapping[str, Array]) -> Array:
        """What one batch shows: float64 [values, 5], for `merge` and `ranges`."""
        found = self.nothing_yet()
        for row, name in zip(found, self.names, strict=True):
            self._note(row, name, values[name])
        return found

    def _note(self, row: Array, name: str, values: Array) -> None:
        row[_SIZE] = values.size
        if not values.size:
            return
        peak = max(float(values.max()), -float(values.min()))
        if not np.isfinite(peak):
            peak = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
        row[_PEAK] = peak
        if name in self.divisors:
            magnitudes = np.abs(values)
            row[_LEAST] = magnitudes[magnitudes > 0].min(initial=np.inf)
        if name in self._whole:
            magnitudes = np.abs(values[np.isfinite(values)])
            for base, bits in _EXACT_BITS.items():
                # Beyond the exact ones a whole number survives only with enough trailing zero bits.
                step = np.ldexp(1.0, np.maximum(np.frexp(magnitudes)[1] - bits, 0))
                row[_INEXACT[base]] = bool(np.any(magnitudes % step))

    def merge(self, one: Array, other: Array) -> Array:
        joined = np.maximum(one, other)
        joined[:, _LEAST] = np.minimum(one[:, _LEAST], other[:, _LEAST])
        return joined

    def ranges(self, seen: Array) -> dict[str, ObservedRange]:
        """By value name."""
        return {
            name: ObservedRange(
                float(row[_PEAK]),
                float(row[_LEAST]),
                int(row[_SIZE]),
                frozenset(base for base, column in _INEXACT.items() if row[column]),
            )
            for name, row in zip(self.names, seen, strict=True)
        }


def _whole_numbers(view: GraphView) -> frozenset[str]:
    """Values that came from integers and were only moved since."""
    whole: set[str] = set()
    for node in view.nodes:
        source = node.input[0] if node.input else ""
        from_integers = node.op_type == "Cast" and view.types.get(source) not in _FLOATS
        if from_integers or (node.op_type in MOVEMENT and source in whole):
            whole.update(node.output)
    return frozenset(name for name in whole if view.is_float(name))
