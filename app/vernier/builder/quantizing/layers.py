"""One weighted node while its weight is rounded: what its input looks like, and what each method makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto

from vernier.builder.graphs.graph import GraphView, attribute
from vernier.builder.lowering.quantized import INT8_MAX, QuantizedWeight
from vernier.builder.nodes.placement import QuantizableNode, weight_axis, weight_position
from vernier.builder.quantizing.patches import operand_rows
from vernier.builder.quantizing.rounding import best_scales, gptq, largest_scales, to_integers
from vernier.builder.quantizing.taps import IntermediateOutputs
from vernier.builder.samples.data import Samples
from vernier.errors import BuildError
from vernier.tensors import Array, Arrays

#: Rows of each sample that are learned from, and that are judged by.
_FIT_ROWS, _HELD_ROWS = 64, 32
#: Wider layers are cut into blocks of columns that are rounded independently: the cost of a block grows
#: with the cube of its width, and inputs far apart have little to do with one another.
_MAX_COLUMNS = 640
#: A more involved method must lower the error by this share.
_GAIN = 0.01


@dataclass
class Layer:
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
        return -(-int(self.matrix.shape[2]) // _MAX_COLUMNS)

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
    def observed_bytes(self) -> int:
        """What the layer takes while it is observed."""
        groups, _, columns = self.matrix.shape
        return int(groups * columns * min(columns, _MAX_COLUMNS) * 4 + self.matrix.nbytes)

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


def open_layer(view: GraphView, described: QuantizableNode, ranges: Mapping[str, float]) -> Layer:
    """Raises BuildError when the node's weight is no constant."""
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
    return Layer(node, activation, position, axis, value.shape, matrix, ranges.get(activation))


# --- looking at the data --------------------------------------------------------------------------
def observe(model: ModelProto, layers: Sequence[Layer], fit: Samples, unseen: Samples) -> None:
    """Fills in what is known about each layer's input, from two disjoint sets of samples."""
    intermediate = IntermediateOutputs(model, [layer.activation for layer in layers])
    rows = intermediate.rows(fit)
    for samples, most, learn in ((fit, _FIT_ROWS, True), (unseen, _HELD_ROWS, False)):

        def operands(values: Arrays, count: int, index: int, most: int = most) -> list[Array | None]:
            return [_operand(layer, values[layer.activation], most, index) for layer in layers]

        for found, _ in intermediate.digests(samples, rows, operands):
            for layer, operand in zip(layers, found, strict=True):
                if operand is None:
                    continue
                if learn:
                    _accumulate(layer, operand)
                elif layer.hessian is not None:
                    layer.held = [*(layer.held or []), operand]


def _operand(layer: Layer, values: Array, most: int, seed: int) -> Array | None:
    found = operand_rows(layer.node, values, layer.shape, layer.position, most, seed)
    return found if found is not None and np.isfinite(found).all() else None


def _accumulate(layer: Layer, rows: Array) -> None:
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
def candidates(layer: Layer, method: str) -> dict[str, QuantizedWeight]:
    """Method → weight, for `method` and those that it may have to give way to. Frees what was observed.

    What needs data (`gptq`, `best`) is among them only if some was observed.
    """
    flat = layer.matrix.reshape(-1, layer.matrix.shape[2])
    plain = largest_scales(flat, layer.per_channel)
    if method == "nearest":
        return {"nearest": layer.packed(to_integers(flat, plain), plain, "nearest")}
    scales = best_scales(flat, layer.per_channel, _importance(layer))
    forms = [(to_integers(flat, plain), plain, "nearest"), (to_integers(flat, scales), scales, "mse")]
    if (rounded := _gptq(layer, scales)) is not None:
        forms.append(rounded)
    found = {form[2]: layer.packed(*form) for form in forms}
    if layer.held:
        found["best"] = _best(layer, forms)
    layer.hessian = layer.held = None
    return found


def _importance(layer: Layer) -> Array | None:
    """Mean square of each column's input, per output channel."""
    if layer.hessian is None:
        return None
    groups, rows, columns = layer.matrix.shape
    diagonal = np.diagonal(layer.hessian, axis1=1, axis2=2).reshape(groups, -1)[:, :columns]
    spread = np.repeat(diagonal / max(layer.rows, 1), rows, axis=0)
    return np.asarray(spread, np.float32)


def _gptq(layer: Layer, scales: Array) -> tuple[Array, Array, str] | None:
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


def _best(layer: Layer, forms: Sequence[tuple[Array, Array, str]]) -> QuantizedWeight:
    """The form with the least error on rows that none has seen; the simpler one when it is close.

    Its mean error, if taking that out helps on those rows too, becomes a bias correction.
    """
    rows = np.concatenate(layer.held or [], axis=1)
    quantized = layer.quantize_rows(rows)
    expected = rows @ layer.matrix.transpose(0, 2, 1)
    chosen, least, gap = forms[0], np.inf, expected
    for form in forms:
        values, scales, _ = form
        weight = _dequantized(layer, values, scales)
        difference = expected - quantized @ weight.transpose(0, 2, 1)
        error = float(np.square(difference, dtype=np.float64).mean())
        if error < least * (1 - _GAIN):
            chosen, least, gap = form, error, difference
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


def _dequantized(layer: Layer, values: Array, scales: Array) -> Array:
    column = scales[:, None] if scales.ndim else scales
    weight: Array = (values * column).reshape(layer.matrix.shape).astype(np.float32)
    return weight
