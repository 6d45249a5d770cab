"""A reduced-precision graph rewritten so that a CPU shows what it will do on a GPU.

ONNX Runtime computes FP16 on a CPU in FP32 and drops the casts between, so that neither the overflow
nor the rounding of FP16 shows; BF16 it does not run at all. Here every tensor becomes FP32, and after
every node that rounds, its output is rounded to the type it had: one pair of casts, which ONNX Runtime
keeps. INT8 weights are dequantized once instead of in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vernier.builder.simplify import drop_unused, keep_nodes
from vernier.builder.store import copy_model, skeleton, subgraphs
from vernier.builder.widen import NARROW, widen_tensor

#: These hand on values or choose among them; what they are given is rounded already.
_MOVES = frozenset(
    {
        *("Cast", "CastLike", "Identity", "Constant", "ConstantOfShape", "Dropout"),
        *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile", "Pad"),
        *("Concat", "Split", "Slice", "Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements"),
        *("DepthToSpace", "SpaceToDepth", "Where", "TopK", "Max", "Min", "ReduceMax", "ReduceMin"),
        *("MaxPool", "GlobalMaxPool", "Relu", "Clip", "Neg", "Abs", "Sign", "Floor", "Ceil"),
    }
)

#: Their results have another type than what they are given.
_OTHER_TYPE = frozenset(
    {
        *("Cast", "Shape", "Size", "ArgMax", "ArgMin", "NonZero", "QuantizeLinear", "IsNaN", "IsInf"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    }
)


def emulate(model: ModelProto) -> ModelProto:
    """A copy of `model` in FP32 that rounds where `model` would; same inputs and outputs."""
    types = _types(model)
    copy = copy_model(model)
    folded = _fold_weights(copy.graph, types)
    if folded or any(t in NARROW for t in types.values()):
        _widen(copy.graph, types)
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


def _widen(graph: GraphProto, types: dict[str, int]) -> None:
    """Makes every narrow tensor of `graph` FP32, in place, rounding after the nodes that round."""
    renamed: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for info in graph.input:
        if info.type.tensor_type.elem_type in NARROW:
            renamed[info.name] = f"{info.name}/wide"
            nodes.append(helper.make_node("Cast", [info.name], [renamed[info.name]], to=TensorProto.FLOAT))
    for output in graph.output:
        if output.type.tensor_type.elem_type in NARROW:
            # It keeps its type; whoever else reads it inside reads it wide.
            renamed[output.name] = f"{output.name}/wide"
    nodes.extend(_widened(graph, types, renamed))
    for output in graph.output:
        if (data_type := output.type.tensor_type.elem_type) in NARROW:
            nodes.append(helper.make_node("Cast", [renamed[output.name]], [output.name], to=data_type))
    del graph.node[:]
    graph.node.extend(nodes)


def _widen_body(body: GraphProto, types: dict[str, int], renamed: dict[str, str]) -> None:
    """The same for the body of an If, Loop or Scan, whose inputs and outputs become FP32 as well."""
    for info in (*body.input, *body.output, *body.value_info):
        tensor = info.type.tensor_type
        types[info.name] = tensor.elem_type
        if tensor.elem_type in NARROW:
            tensor.elem_type = TensorProto.FLOAT
    for output in body.output:
        output.name = renamed.get(output.name, output.name)
    nodes = list(_widened(body, types, renamed))
    del body.node[:]
    body.node.extend(nodes)


def _widened(graph: GraphProto, types: dict[str, int], renamed: dict[str, str]) -> Iterator[NodeProto]:
    for tensor in graph.initializer:
        if tensor.data_type in NARROW:
            types[tensor.name] = tensor.data_type
            widen_tensor(tensor)
    for node in graph.node:
        to = next((a for a in node.attribute if a.name == "to" and node.op_type == "Cast"), None)
        if to is not None:
            types[node.output[0]] = to.i
        narrow_inputs = [types[name] for name in node.input if types.get(name) in NARROW]
        if narrow_inputs and node.op_type not in _OTHER_TYPE:
            # Type inference says nothing about values inside bodies: they have their inputs' type.
            types.update({name: narrow_inputs[0] for name in node.output if name not in types})
        for body in subgraphs(node):
            _widen_body(body, dict(types), renamed)
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        _widen_attributes(node)
        rounds = node.op_type not in _MOVES
        if to is not None and to.i in NARROW:
            to.i = TensorProto.FLOAT
            rounds = True
        casts = []
        for position, name in enumerate(node.output):
            wide = renamed.get(name, name)
            node.output[position] = wide
            if name and rounds and types.get(name) in NARROW:
                node.output[position] = f"{name}/raw"
                casts.append(helper.make_node("Cast", [f"{name}/raw"], [f"{name}/narrow"], to=types[name]))
                casts.append(helper.make_node("Cast", [f"{name}/narrow"], [wide], to=TensorProto.FLOAT))
        yield node
        yield from casts
    del graph.value_info[:]


def _widen_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            widen_tensor(attribute.t)
        if attribute.name == "dtype" and attribute.i in NARROW:
            attribute.i = TensorProto.FLOAT
