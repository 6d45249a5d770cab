"""Which of several sets of quantized weights leaves the model's own outputs closest to FP32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto

from vernier.builder.evaluate import Evaluator
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.lowering.quantized import QuantizedWeight
from vernier.builder.nodes.placement import QuantizableNode
from vernier.builder.quantizing.rehearsal import damage
from vernier.builder.samples.data import Samples
from vernier.errors import BuildError
from vernier.tensors import Arrays

Weights = dict[str, QuantizedWeight]

#: A plan must beat the one before it by this share: plans come in order of preference.
_GAIN = 0.02


def select_weights(
    model: ModelProto,
    nodes: Sequence[QuantizableNode],
    samples: Samples,
    ranges: Mapping[str, float],
    plans: Sequence[Weights],
) -> Weights:
    """The plan with the least damage when every node of `nodes` runs in INT8; `plans[0]` when in doubt.

    A rounding that is better for a node by itself can still be worse for what comes after it. A model
    whose outputs cannot be compared (their shape depends on the data) keeps the first plan.
    """
    int8 = frozenset(n.name for n in nodes if all(a in ranges for a in n.activations))
    try:
        reference = _flat(Evaluator(model, as_on_gpu=False).run(samples))
        harms = []
        for weights in plans:
            lowered = lower(model, Recipe("fp32", int8=int8, ranges=ranges, weights=weights))
            harms.append(damage(reference, _flat(Evaluator(lowered).run(samples))))
    except BuildError:
        return plans[0]
    best = 0
    for index in range(1, len(plans)):
        if harms[index] < harms[best] * (1 - _GAIN):
            best = index
    return plans[best]


def _flat(outputs: Arrays) -> Arrays:
    """Float outputs as [samples, elements]; the others cannot be off by a little."""
    return {n: a.reshape(len(a), -1).astype(np.float32) for n, a in outputs.items() if a.dtype.kind == "f"}
