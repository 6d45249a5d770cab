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

from vernier.builder.opset import value_names
from vernier.builder.simplify import keep_nodes, rename_values
from vernier.builder.store import all_graphs, unused_name

NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")


def widen(model: ModelProto) -> bool:
    """Makes every narrow float of `model` FP32, in place. Returns whether there was a weight among them."""
    graphs = list(all_graphs(model.graph))
    if not any(tensor.data_type in NARROW for graph in graphs for tensor in _tensors(graph)):
        return False
    taken = value_names(model)
    for graph in graphs:
        for tensor in _tensors(graph):
            widen_tensor(tensor)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in _TYPE_ATTRIBUTES and attribute.i in NARROW:
                    attribute.i = TensorProto.FLOAT
        del graph.value_info[:]
        if graph is not model.graph:
            for value in [*graph.input, *graph.output]:
                if value.type.tensor_type.elem_type in NARROW:
                    value.type.tensor_type.elem_type = TensorProto.FLOAT
    _cast_at_the_border(model.graph, taken)
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


def _cast_at_the_border(graph: GraphProto, taken: set[str]) -> None:
    before: list[NodeProto] = []
    after: list[NodeProto] = []
    renamed: dict[str, str] = {}
    for value in graph.input:
        if value.type.tensor_type.elem_type in NARROW:
            renamed[value.name] = wide = unused_name(f"{value.name} as FP32", taken)
            before.append(helper.make_node("Cast", [value.name], [wide], to=TensorProto.FLOAT))
    for value in graph.output:
        if value.type.tensor_type.elem_type in NARROW and value.name not in renamed:
            renamed[value.name] = wide = unused_name(f"{value.name} as FP32", taken)
            after.append(helper.make_node("Cast", [wide], [value.name], to=value.type.tensor_type.elem_type))
    rename_values(graph.node, renamed)
    keep_nodes(graph, [*before, *graph.node, *after])
