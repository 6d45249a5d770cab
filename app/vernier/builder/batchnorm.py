"""Folds BatchNormalization into the weights of the Conv, ConvTranspose, Gemm or MatMul before it.

Quantization sees the weights that really run, and the node costs nothing. The arithmetic is done in
float64, so that folding moves an answer by no more than float32's own rounding.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from vernier.builder.simplify import drop_unused, keep_nodes, uses
from vernier.tensors import Array


def fold_batch_norms(model: ModelProto) -> int:
    """Folds in place wherever the weight is a constant and nothing else reads what lies between.

    Returns how many BatchNormalizations went.
    """
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    counts = uses(graph)
    gone: set[str] = set()
    for node in graph.node:
        if node.op_type != "BatchNormalization" or not all(name in constants for name in node.input[1:5]):
            continue
        before = producers.get(node.input[0])
        if before is None or counts[node.input[0]] != 1:
            continue
        scale, shift = _affine(node, constants)
        if _fold(graph, before, node, scale, shift, constants, producers, counts):
            gone.add(node.output[0])
    if gone:
        keep_nodes(
            graph, [n for n in graph.node if not (n.op_type == "BatchNormalization" and n.output[0] in gone)]
        )
        drop_unused(graph)
    return len(gone)


def _affine(node: NodeProto, constants: dict[str, TensorProto]) -> tuple[Array, Array]:
    """y = scale · x + shift, in float64, per channel."""
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    gamma, beta, mean, variance = (
        numpy_helper.to_array(constants[name]).astype(np.float64) for name in node.input[1:5]
    )
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale


def _fold(
    graph: GraphProto,
    before: NodeProto,
    norm: NodeProto,
    scale: Array,
    shift: Array,
    constants: dict[str, TensorProto],
    producers: dict[str, NodeProto],
    counts: dict[str, int],
) -> bool:
    if before.op_type in ("Conv", "ConvTranspose", "Gemm"):
        weighted, bias_at = before, 2
    elif before.op_type == "Add":  # MatMul + bias
        products = [
            p for p in (producers.get(n) for n in before.input) if p is not None and p.op_type == "MatMul"
        ]
        if (
            len(products) != 1
            or counts[products[0].output[0]] != 1
            or not _is_matrix(graph, before.output[0])
        ):
            return False
        weighted = products[0]
        bias_at = 1 if before.input[0] == weighted.output[0] else 0
    else:
        return False
    weight = constants.get(weighted.input[1])
    bias_name = before.input[bias_at] if len(before.input) > bias_at else ""
    if weight is None or (bias_name and bias_name not in constants):
        return False
    values = numpy_helper.to_array(weight)
    bias = numpy_helper.to_array(constants[bias_name]) if bias_name else np.zeros(1, values.dtype)
    factor = _factor(weighted, values, scale)
    per_channel = bias.size in (1, scale.size) and bias.reshape(-1).shape == bias.shape[-1:]
    if factor is None or not per_channel:
        return False
    if weighted.op_type == "Gemm" and any(
        a.name in ("alpha", "beta") and a.f != 1.0 for a in weighted.attribute
    ):
        return False
    base = norm.output[0]
    weighted.input[1] = _store(graph, constants, f"{base}_folded_weight", values * factor, values.dtype)
    folded_bias = bias.astype(np.float64).reshape(-1) * scale + shift
    while len(before.input) <= bias_at:
        before.input.append("")
    before.input[bias_at] = _store(graph, constants, f"{base}_folded_bias", folded_bias, values.dtype)
    before.output[0] = norm.output[0]
    producers[norm.output[0]] = before
    counts[norm.output[0]] = counts.get(norm.output[0], 0)
    return True


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


def _is_matrix(graph: GraphProto, name: str) -> bool:
    return any(v.name == name and len(v.type.tensor_type.shape.dim) == 2 for v in graph.value_info)


def _store(
    graph: GraphProto,
    constants: dict[str, TensorProto],
    name: str,
    values: Array,
    dtype: np.dtype[np.generic],
) -> str:
    tensor = numpy_helper.from_array(values.astype(dtype), name)
    graph.initializer.append(tensor)
    constants[name] = tensor
    return name
