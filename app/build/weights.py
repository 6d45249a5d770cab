"""Turns the weights of quantizable nodes into INT8, each by the method that serves it best.

A method is judged by what it does to the node's own output on samples that it has not seen, with the
node's input quantized as it will be; and all of them together by what they do to the model's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from onnx import ModelProto, NodeProto

from app.build.data import Samples, Subset
from app.build.graph import GraphView, attribute
from app.build.patches import operand_rows
from app.build.placement import QuantizableNode, weight_axis, weight_position
from app.build.progress import NoProgress, Progress
from app.build.quantized import INT8_MAX, QuantizedWeight
from app.build.rounding import best_scales, gptq, largest_scales, to_integers
from app.build.settle import settle
from app.build.taps import Taps
from app.errors import BuildError
from app.tensors import Array

WeightMethod = Literal["nearest", "mse", "gptq", "best"]
WEIGHT_METHODS: tuple[str, ...] = get_args(WeightMethod)

_FIT_SAMPLES, _FIT_ROWS = 64, 64
_HELD_SAMPLES, _HELD_ROWS = 16, 32
#: The outputs of the whole model are compared on more samples, as many as this many operations allow.
_SETTLE_SAMPLES, _SETTLE_MACS = 128, 1e11
#: Below this many samples nothing can be learned and checked; weights are rounded without data.
_LEAST_SAMPLES = 8
#: Hessians of so many bytes are held at once.
_HESSIAN_BYTES = 1 << 30
#: Wider layers are cut into blocks of columns that are rounded independently: the cost of a block grows
#: with the cube of its width, and inputs far apart have little to do with one another.
_MOST_COLUMNS = 640
#: A more involved method must lower the error by this share.
_GAIN = 0.01


@dataclass
class _Layer:
    """One weighted node while its weight is rounded.

    matrix: [groups, output channels per group, columns].
    hessian: [groups · blocks, columns per block, …], Xᵀ·X of the rows that the weight is multiplied with.
    mean, quantized_mean: [groups, columns], sums of those rows.
    held: rows of samples that the rounding has not seen, before their quantization.
    """

    node: NodeProto
    activation: str
    position: int
    axis: int | None
    shape: tuple[int, ...]
    matrix: Array
    scale: float | None
    hessian: Array | None = None
    mean: Array | None = None
    quantized_mean: Array | None = None
    rows: int = 0
    held: list[Array] | None = None

    @property
    def blocks(self) -> int:
        return -(-int(self.matrix.shape[2]) // _MOST_COLUMNS)

    def in_blocks(self, rows: Array) -> Array:
        """[groups, rows, columns] → [groups · blocks, rows, columns per block], filled up with zeros."""
        groups, count, columns = rows.shape
        width = -(-columns // self.blocks)
        if self.blocks == 1:
            return rows
        padded = np.pad(rows, [(0, 0), (0, 0), (0, width * self.blocks - columns)])
        cut = padded.reshape(groups, count, self.blocks, width).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(cut).reshape(groups * self.blocks, count, width)

    @property
    def per_channel(self) -> bool:
        return self.axis is not None

    def quantize_rows(self, rows: Array) -> Array:
        """What the node will read where it reads `rows` now."""
        if self.scale is None:
            return rows
        quantized: Array = np.clip(np.rint(rows / self.scale), -INT8_MAX - 1, INT8_MAX) * self.scale
        return quantized.astype(np.float32)

    def packed(self, values: Array, scales: Array, method: str) -> QuantizedWeight:
        """From the matrix form back to the shape in which the node reads its weight."""
        axis = self.axis or 0
        moved = (self.shape[axis], *self.shape[:axis], *self.shape[axis + 1 :])
        array = np.ascontiguousarray(np.moveaxis(values.reshape(moved), 0, axis))
        scales = scales.reshape(-1) if self.per_channel else scales.reshape(())
        return QuantizedWeight(array, scales.astype(np.float32), axis, None, method)


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
            (rounding that makes up for its own errors, Frantar et al. 2022), or `best` of these with a
            bias correction, per node and only where it helps on samples that it did not see.
        ranges: INT8 scales of activations; with them rounding takes account of quantized inputs.

    Raises:
        BuildError: an unknown method, or the model fails on the samples.
    """
    if method not in WEIGHT_METHODS:
        raise BuildError(f"'{method}' is no way to round weights; choose one of {', '.join(WEIGHT_METHODS)}")
    progress = progress or NoProgress()
    view = GraphView(model)
    usable = samples if samples is not None and len(samples) >= _LEAST_SAMPLES else None
    found: dict[str, QuantizedWeight] = {}
    weighted = [node for node in nodes if node.weight is not None]
    needs_data = usable is not None and method in ("gptq", "best")
    with progress.task("rounding weights", total=len(weighted)) as advance:
        for chunk in _chunks(view, weighted, ranges or {}):
            if needs_data and usable is not None:
                _observe(model, chunk, usable)
            for layer in chunk:
                found[layer.node.name] = _round(layer, method)
                advance(1)
    if method == "best" and usable is not None and ranges:
        simple = quantize_weights(model, nodes, None, "nearest")
        plans = [found, without_corrections(found), simple]
        return settle(model, nodes, _unseen(usable, sum(node.macs for node in nodes)), ranges, plans)
    return found


def without_corrections(weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """The same weights, no node's output shifted."""
    return {name: replace(weight, bias_correction=None) for name, weight in weights.items()}


def _chunks(
    view: GraphView, nodes: Sequence[QuantizableNode], ranges: Mapping[str, float]
) -> Iterator[list[_Layer]]:
    chunk: list[_Layer] = []
    size = 0
    for described in nodes:
        layer = _layer(view, described, ranges)
        groups, _, columns = layer.matrix.shape
        own = groups * columns * min(columns, _MOST_COLUMNS) * 4 + layer.matrix.nbytes
        if chunk and size + own > _HESSIAN_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(layer)
        size += own
    if chunk:
        yield chunk


def _layer(view: GraphView, described: QuantizableNode, ranges: Mapping[str, float]) -> _Layer:
    node = view.by_name[described.name]
    position = weight_position(view, node)
    value = view.constant(described.weight or "")
    if position is None or value is None:
        raise BuildError(f"the weight of node '{described.name}' is no constant: take the node out")
    axis = weight_axis(view, node)
    rows = np.moveaxis(value, axis or 0, 0)
    groups = int(attribute(node, "group", 1)) if node.op_type == "Conv" else 1
    matrix = np.ascontiguousarray(rows.reshape(groups, rows.shape[0] // groups, -1), np.float32)
    activation = described.activations[0]
    return _Layer(node, activation, position, axis, value.shape, matrix, ranges.get(activation))


# --- looking at the data --------------------------------------------------------------------------
def _observe(model: ModelProto, layers: Sequence[_Layer], samples: Samples) -> None:
    """Fills in what is known about each layer's input, from two disjoint sets of samples."""
    fit, unseen = _split(samples)
    taps = Taps(model, [layer.activation for layer in layers])
    rows = taps.rows(samples)
    for seed, (values, _) in enumerate(taps.batches(fit, rows)):
        for layer in layers:
            found = operand_rows(
                layer.node, values[layer.activation], layer.shape, layer.position, _FIT_ROWS, seed
            )
            if found is not None and np.isfinite(found).all():
                _accumulate(layer, found)
    for seed, (values, _) in enumerate(taps.batches(unseen, rows)):
        for layer in layers:
            found = operand_rows(
                layer.node, values[layer.activation], layer.shape, layer.position, _HELD_ROWS, seed
            )
            if found is not None and layer.hessian is not None and np.isfinite(found).all():
                layer.held = [*(layer.held or []), found]


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
    most = int(np.clip(_SETTLE_MACS / max(macs, 1), _HELD_SAMPLES, _SETTLE_SAMPLES))
    return Subset(samples, np.sort(_order(samples)[: len(samples) // 4][:most]))


def _accumulate(layer: _Layer, rows: Array) -> None:
    quantized = layer.quantize_rows(rows)
    blocks = layer.in_blocks(quantized)
    product = blocks.transpose(0, 2, 1) @ blocks
    total, quantized_total = rows.sum(axis=1, dtype=np.float64), quantized.sum(axis=1, dtype=np.float64)
    if layer.hessian is None or layer.mean is None or layer.quantized_mean is None:
        layer.hessian, layer.mean, layer.quantized_mean = product, total, quantized_total
    else:
        layer.hessian += product
        layer.mean += total
        layer.quantized_mean += quantized_total
    layer.rows += rows.shape[1]


# --- rounding -------------------------------------------------------------------------------------
def _round(layer: _Layer, method: str) -> QuantizedWeight:
    """The weight by `method`, or by the best of those that the data allows. Frees what was observed."""
    flat = layer.matrix.reshape(-1, layer.matrix.shape[2])
    plain = largest_scales(flat, layer.per_channel)
    if method == "nearest":
        return layer.packed(to_integers(flat, plain), plain, "nearest")
    scales = best_scales(flat, layer.per_channel, _importance(layer))
    if layer.hessian is None or method == "mse":
        return layer.packed(to_integers(flat, scales), scales, "mse")
    rounded = _gptq(layer, scales)
    if method == "gptq":
        result = layer.packed(*rounded) if rounded else layer.packed(to_integers(flat, scales), scales, "mse")
    else:
        candidates = [
            (to_integers(flat, plain), plain, "nearest"),
            (to_integers(flat, scales), scales, "mse"),
        ]
        result = _best(layer, [*candidates, *([rounded] if rounded else [])])
    layer.hessian = layer.held = None
    return result


def _importance(layer: _Layer) -> Array | None:
    """Mean square of each column's input, per output channel."""
    if layer.hessian is None:
        return None
    groups, rows, columns = layer.matrix.shape
    diagonal = np.diagonal(layer.hessian, axis1=1, axis2=2).reshape(groups, -1)[:, :columns]
    spread = np.repeat(diagonal / max(layer.rows, 1), rows, axis=0)
    return np.asarray(spread, np.float32)


def _gptq(layer: _Layer, scales: Array) -> tuple[Array, Array, str] | None:
    if layer.hessian is None:
        return None
    groups, rows, columns = layer.matrix.shape
    shaped = np.repeat(scales.reshape(groups, rows), layer.blocks, axis=0) if layer.per_channel else scales
    try:
        values = gptq(layer.in_blocks(layer.matrix), shaped, layer.hessian)
    except np.linalg.LinAlgError:
        return None
    joined = values.reshape(groups, layer.blocks, rows, -1).transpose(0, 2, 1, 3).reshape(groups * rows, -1)
    return np.ascontiguousarray(joined[:, :columns]), scales, "gptq"


def _best(layer: _Layer, candidates: Sequence[tuple[Array, Array, str]]) -> QuantizedWeight:
    """The candidate with the least error on rows that none has seen; the simpler one when it is close."""
    if not layer.held:
        return layer.packed(*candidates[1])
    rows = np.concatenate(layer.held, axis=1)
    quantized = layer.quantize_rows(rows)
    expected = rows @ layer.matrix.transpose(0, 2, 1)
    chosen, least, gap = candidates[0], np.inf, expected
    for candidate in candidates:
        values, scales, _ = candidate
        weight = _dequantized(layer, values, scales)
        difference = expected - quantized @ weight.transpose(0, 2, 1)
        error = float(np.square(difference, dtype=np.float64).mean())
        if error < least * (1 - _GAIN):
            chosen, least, gap = candidate, error, difference
    result = layer.packed(*chosen)
    if not layer.per_channel or layer.mean is None or layer.quantized_mean is None:
        return result
    weight = _dequantized(layer, chosen[0], chosen[1])
    shift = (layer.mean[:, None, :] / layer.rows) @ layer.matrix.transpose(0, 2, 1)
    shift = shift - (layer.quantized_mean[:, None, :] / layer.rows) @ weight.transpose(0, 2, 1)
    # A Gemm scales its product; `gap` is measured before that, the correction is added after it.
    factor = float(attribute(layer.node, "alpha", 1.0)) if layer.node.op_type == "Gemm" else 1.0
    corrected = float(np.square(gap - shift, dtype=np.float64).mean())
    if corrected < least * (1 - _GAIN):
        return replace(result, bias_correction=(shift * factor).reshape(-1).astype(np.float32))
    return result


def _dequantized(layer: _Layer, values: Array, scales: Array) -> Array:
    column = scales[:, None] if scales.ndim else scales
    weight: Array = (values * column).reshape(layer.matrix.shape).astype(np.float32)
    return weight
