"""Turns the weights of quantizable nodes into INT8, each by the method that serves it best.

A method is judged by what it does to the node's own output on samples that it has not seen, with the
node's input quantized as it will be; and whole sets of weights by what they do to the model's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from onnx import ModelProto
from threadpoolctl import threadpool_limits

from vernier.builder.graphs.graph import GraphView
from vernier.builder.lowering.quantized import QuantizedWeight
from vernier.builder.nodes.placement import QuantizableNode
from vernier.builder.parallel import in_order
from vernier.builder.progress import NoProgress, Progress
from vernier.builder.quantizing.layers import Layer, candidates, observe, open_layer
from vernier.builder.quantizing.settle import select_weights
from vernier.builder.samples.data import Samples, Subset
from vernier.errors import BuildError
from vernier.tensors import Array

WeightMethod = Literal["nearest", "mse", "gptq", "best"]
WEIGHT_METHODS: tuple[str, ...] = get_args(WeightMethod)

_FIT_SAMPLES, _HELD_SAMPLES = 64, 16
#: The outputs of the whole model are compared on more samples, as many as this many operations allow.
_SELECT_SAMPLES, _SELECT_MACS = 128, 2.5e10
#: Below this many samples nothing can be learned and checked; weights are rounded without data.
_MIN_SAMPLES = 8
#: Layers that are observed at once take no more than this.
_OBSERVED_BYTES = 1 << 30
#: What to use where a method does not apply.
_INSTEAD = {"best": ("best", "mse"), "gptq": ("gptq", "mse"), "mse": ("mse",), "nearest": ("nearest",)}


def quantize_weights(
    model: ModelProto,
    nodes: Sequence[QuantizableNode],
    samples: Samples | None = None,
    method: WeightMethod = "best",
    progress: Progress | None = None,
    *,
    ranges: Mapping[str, float] | None = None,
) -> dict[str, QuantizedWeight]:
    """INT8 weights of those `nodes` that have a weight, by node name.

    Args:
        samples: calibration data; without it, or with fewer than 8 samples, no method that needs data
            is used.
        method: `nearest` (largest magnitude to 127), `mse` (scales with the least squared error), `gptq`
            (rounding that makes up for its own errors, Frantar et al. 2022), or `best`: per node the one of
            these, with or without a bias correction, that helps on samples it did not see; unless the
            outputs of the whole model say that the same method everywhere is better.
        ranges: INT8 scales of activations; with them rounding takes account of quantized inputs.

    Raises:
        BuildError: an unknown method, or the model fails on the samples.
    """
    if method not in WEIGHT_METHODS:
        raise BuildError(f"'{method}' is no way to round weights; choose one of {', '.join(WEIGHT_METHODS)}")
    progress = progress or NoProgress()
    view = GraphView(model)
    usable = samples if samples is not None and len(samples) >= _MIN_SAMPLES else None
    found: dict[str, dict[str, QuantizedWeight]] = {}
    weighted = [node for node in nodes if node.weight is not None]
    with progress.task("rounding weights", total=len(weighted)) as advance:
        for chunk in _chunks(view, weighted, ranges or {}):
            if usable is not None and method in ("gptq", "best"):
                observe(model, chunk, *_split(usable))
            # Layers share nothing, and NumPy's own threads would only wait for one another.
            with threadpool_limits(1, user_api="blas"):
                for layer, forms in zip(
                    chunk, in_order(lambda layer: candidates(layer, method), chunk), strict=True
                ):
                    found[layer.node.name] = forms
                    advance(1)
    if method != "best" or usable is None or not ranges:
        return _pick(found, method)
    own = _pick(found, "best")
    plans = [own, without_corrections(own), *(_pick(found, other) for other in ("gptq", "mse", "nearest"))]
    return select_weights(model, nodes, _unseen(usable, sum(node.macs for node in nodes)), ranges, plans)


def without_corrections(weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The same weights, no node's output shifted."""
    return {name: replace(weight, bias_correction=None) for name, weight in weights.items()}


def _pick(found: Mapping[str, Mapping[str, QuantizedWeight]], method: str) -> dict[str, QuantizedWeight]:
    return {
        name: next(forms[instead] for instead in _INSTEAD[method] if instead in forms)
        for name, forms in found.items()
    }


def _chunks(
    view: GraphView, nodes: Sequence[QuantizableNode], ranges: Mapping[str, float]
) -> Iterator[list[Layer]]:
    chunk: list[Layer] = []
    size = 0
    for described in nodes:
        layer = open_layer(view, described, ranges)
        if chunk and size + layer.observed_bytes > _OBSERVED_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(layer)
        size += layer.observed_bytes
    if chunk:
        yield chunk


def _order(samples: Samples) -> Array:
    """Samples to judge by come first, a quarter at most; samples to learn from follow."""
    return np.random.default_rng(0).permutation(len(samples))


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to learn from and samples to judge by."""
    order, aside = _order(samples), len(samples) // 4
    fit, held = order[aside : aside + _FIT_SAMPLES], order[: min(_HELD_SAMPLES, aside)]
    return Subset(samples, np.sort(fit)), Subset(samples, np.sort(held))


def _unseen(samples: Samples, macs: int) -> Samples:
    """Samples that nothing was learned from, as many as can be run in reasonable time."""
    most = int(np.clip(_SELECT_MACS / max(macs, 1), _MIN_SAMPLES, _SELECT_SAMPLES))
    return Subset(samples, np.sort(_order(samples)[: len(samples) // 4][:most]))
