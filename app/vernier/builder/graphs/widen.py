"""Turns a model that was exported in FP16 or BF16 into FP32, with inputs and outputs of their own types.

The builder compares every variant with FP32 and quantizes FP32 weights; a file that is narrow already
would be its own, coarse reference. Its numbers stay what they are: each one is exact in FP32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from vernier.builder.graphs.simplify import keep_nodes
from vernier.builder.graphs.store import all_graphs, subgraphs

NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
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
_TYPE_ATTRIBUTES = ("dtype", "output_dtype", "stash_type")


def widen(model: ModelProto) -> bool:
    """Makes every narrow float of `model` FP32, in place. Returns whether there was a weight among them."""
    graphs = list(all_graphs(model.graph))
    if not any(tensor.data_type in NARROW for graph in graphs for tensor in _tensors(graph)):
        return False
    widen_graph(model.graph, {}, rounding=False)
    return True


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t


def widen_tensor(tensor: TensorProto) -> None:
    """Makes an FP16 or BF16 constant FP32, in place."""
    if tensor.data_type in NARROW:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def widen_graph(graph: GraphProto, types: dict[str, int], rounding: bool) -> None:
    """Makes every narrow tensor of a model's outermost graph FP32, in place; inputs and outputs keep their types.

    Args:
        types: value name → element type, as far as they are known; needed for rounding alone.
        rounding: whether results are rounded to the type that they had, after the nodes that round.
    """
    renamed: dict[str, str] = {}
    cast_back: dict[str, int] = {}
    nodes: list[NodeProto] = []
    for info in graph.input:
        if info.type.tensor_type.elem_type in NARROW:
            renamed[info.name] = f"{info.name}/wide"
            nodes.append(helper.make_node("Cast", [info.name], [renamed[info.name]], to=TensorProto.FLOAT))
    for output in graph.output:
        if output.type.tensor_type.elem_type in NARROW and output.name not in renamed:
            # It keeps its type; nodes that read it inside read it wide.
            renamed[output.name] = f"{output.name}/wide"
            cast_back[output.name] = output.type.tensor_type.elem_type
    nodes.extend(_widened(graph, types, renamed, rounding))
    for name, data_type in cast_back.items():
        nodes.append(helper.make_node("Cast", [renamed[name]], [name], to=data_type))
    keep_nodes(graph, nodes)


def _widen_body(body: GraphProto, types: dict[str, int], renamed: dict[str, str], rounding: bool) -> None:
    """The same for the body of an If, Loop or Scan, whose inputs and outputs become FP32 as well."""
    for info in (*body.input, *body.output, *body.value_info):
        tensor = info.type.tensor_type
        types[info.name] = tensor.elem_type
        if tensor.elem_type in NARROW:
            tensor.elem_type = TensorProto.FLOAT
    for output in body.output:
        output.name = renamed.get(output.name, output.name)
    keep_nodes(body, _widened(body, types, renamed, rounding))


def _widened(
    graph: GraphProto, types: dict[str, int], renamed: dict[str, str], rounding: bool
) -> Iterator[NodeProto]:
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
            _widen_body(body, dict(types), renamed, rounding)
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
            if name and rounding and rounds and types.get(name) in NARROW:
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
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i in NARROW:
            attribute.i = TensorProto.FLOAT
