"""A reduced-precision graph rewritten so that a CPU shows what it will do on a GPU.

ONNX Runtime computes FP16 on a CPU in FP32 and drops the casts between, so that neither the overflow
nor the rounding of FP16 shows; BF16 it does not run at all. Here every tensor becomes FP32, and after
every node that rounds, its output is rounded to the type it had: one pair of casts, which ONNX Runtime
keeps. INT8 weights are dequantized once instead of in every run.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from vernier.builder.graphs.simplify import drop_unused, keep_nodes
from vernier.builder.graphs.store import copy_model, skeleton
from vernier.builder.graphs.widen import NARROW, widen_graph


def emulate(model: ModelProto) -> ModelProto:
    """A copy of `model` in FP32 that rounds where `model` would; same inputs and outputs."""
    types = _types(model)
    copy = copy_model(model)
    folded = _fold_weights(copy.graph, types)
    if folded or any(t in NARROW for t in types.values()):
        widen_graph(copy.graph, types, rounding=True)
    return copy


def _types(model: ModelProto) -> dict[str, int]:
    """The element type of every tensor of the outermost graph."""
    inferred = onnx.shape_inference.infer_shapes(skeleton(model)).graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for info in (*inferred.input, *inferred.output, *inferred.value_info):
        types[info.name] = info.type.tensor_type.elem_type
    return types


def _fold_weights(graph: GraphProto, types: dict[str, int]) -> bool:
    """Replaces DequantizeLinear of an initializer by its result, rounded to the result's type."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    kept, folded = [], []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or any(name and name not in weights for name in node.input):
            kept.append(node)
            continue
        values, scale = (numpy_helper.to_array(weights[name]) for name in node.input[:2])
        zero = (
            numpy_helper.to_array(weights[node.input[2]]) if len(node.input) > 2 and node.input[2] else None
        )
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale.ndim:
            shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
            scale = scale.reshape(shape)
            zero = None if zero is None else zero.reshape(shape)
        wide = values.astype(np.float32) - (0 if zero is None else zero.astype(np.float32))
        result = wide * scale.astype(np.float32)
        folded.append(_narrow_weight(result, types.get(node.output[0], TensorProto.FLOAT), node.output[0]))
    if not folded:
        return False
    keep_nodes(graph, kept)
    graph.initializer.extend(folded)
    drop_unused(graph)
    return True


def _narrow_weight(values: np.ndarray, data_type: int, name: str) -> TensorProto:
    """A tensor of `data_type`; BF16 and FP16 are rounded here and widened with the other initializers."""
    if data_type in NARROW:
        values = values.astype(helper.tensor_dtype_to_np_dtype(data_type))
    return numpy_helper.from_array(values, name)
