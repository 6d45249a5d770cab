"""Folds BatchNormalization into the weights of the Conv, ConvTranspose, Gemm or MatMul before it.

Quantization sees the weights that really run, and the node costs nothing. The arithmetic is done in
float64, so that folding moves an answer by no more than float32's own rounding.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from vernier.builder.graphs.simplify import drop_unused, keep_nodes, uses
from vernier.tensors import Array


def fold_batch_norms(model: ModelProto) -> int:
    """Folds in place wherever the weight is a constant and nothing else reads what lies between.

    Returns how many BatchNormalizations went.
    """
    graph = model.graph
    folding = _Folding(graph)
    kept = [node for node in graph.node if node.op_type != "BatchNormalization" or not folding.folds(node)]
    gone = len(graph.node) - len(kept)
    if gone:
        keep_nodes(graph, kept)
        drop_unused(graph)
    return gone


class _Folding:
    """A graph whose BatchNormalizations are folded, one after the other."""

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self._constants = {t.name: t for t in graph.initializer}
        self._producers = {output: node for node in graph.node for output in node.output}
        self._counts = uses(graph)

    def folds(self, norm: NodeProto) -> bool:
        """Folds `norm` into the node before it, which then writes its output. False where that cannot be."""
        before = self._producers.get(norm.input[0])
        if (
            before is None
            or self._counts[norm.input[0]] != 1
            or any(name not in self._constants for name in norm.input[1:5])
        ):
            return False
        weighted, bias_at = self._weighted(before)
        if weighted is None:
            return False
        weight = self._constants.get(weighted.input[1])
        bias_name = before.input[bias_at] if len(before.input) > bias_at else ""
        if weight is None or (bias_name and bias_name not in self._constants):
            return False
        scale, shift = _affine(norm, self._constants)
        values = numpy_helper.to_array(weight)
        bias = numpy_helper.to_array(self._constants[bias_name]) if bias_name else np.zeros(1, values.dtype)
        factor = _factor(weighted, values, scale)
        per_channel = bias.size in (1, scale.size) and bias.reshape(-1).shape == bias.shape[-1:]
        scaled = weighted.op_type == "Gemm" and any(
            a.name in ("alpha", "beta") and a.f != 1.0 for a in weighted.attribute
        )
        if factor is None or not per_channel or scaled:
            return False
        base = norm.output[0]
        weighted.input[1] = self._store(f"{base}_folded_weight", (values * factor).astype(values.dtype))
        folded_bias = bias.astype(np.float64).reshape(-1) * scale + shift
        while len(before.input) <= bias_at:
            before.input.append("")
        before.input[bias_at] = self._store(f"{base}_folded_bias", folded_bias.astype(values.dtype))
        before.output[0] = base
        self._producers[base] = before
        return True

    def _weighted(self, before: NodeProto) -> tuple[NodeProto | None, int]:
        """The node whose weight takes the scale, and the input of `before` that takes the shift."""
        if before.op_type in ("Conv", "ConvTranspose", "Gemm"):
            return before, 2
        if before.op_type != "Add":
            return None, 0
        makers = [self._producers.get(name) for name in before.input]
        products = [m for m in makers if m is not None and m.op_type == "MatMul"]
        is_matrix = any(
            v.name == before.output[0] and len(v.type.tensor_type.shape.dim) == 2
            for v in self._graph.value_info
        )
        if len(products) != 1 or self._counts[products[0].output[0]] != 1 or not is_matrix:
            return None, 0
        return products[0], 1 if before.input[0] == products[0].output[0] else 0

    def _store(self, name: str, values: Array) -> str:
        self._constants[name] = numpy_helper.from_array(values, name)
        self._graph.initializer.append(self._constants[name])
        return name


def _affine(node: NodeProto, constants: dict[str, TensorProto]) -> tuple[Array, Array]:
    """y = scale · x + shift, in float64, per channel."""
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    gamma, beta, mean, variance = (
        numpy_helper.to_array(constants[name]).astype(np.float64) for name in node.input[1:5]
    )
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale


def _factor(node: NodeProto, weight: Array, scale: Array) -> Array | None:
    """`scale` shaped so that it multiplies the weight's output channels, or None when they don't match."""
    if node.op_type == "Conv":
        return scale.reshape(-1, *[1] * (weight.ndim - 1)) if weight.shape[0] == scale.size else None
    if node.op_type == "ConvTranspose":
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if weight.shape[1] * groups != scale.size:
            return None
        per_input = np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        return per_input.reshape(*per_input.shape, *[1] * (weight.ndim - 2))
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    axis = 0 if node.op_type == "Gemm" and transposed else weight.ndim - 1
    if weight.ndim != 2 or weight.shape[axis] != scale.size:
        return None
    return scale.reshape(-1, 1) if axis == 0 else scale.reshape(1, -1)
