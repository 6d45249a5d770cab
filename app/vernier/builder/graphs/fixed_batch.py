"""Rewrites a model exported for one fixed batch size so that it may take any; the caller proves it."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from vernier.builder.graphs.simplify import drop_unused, infer_shapes
from vernier.builder.graphs.store import INLINE_LIMIT_BYTES, copy_model, unused_name, weight_bytes
from vernier.tensors import Array


def make_batch_dynamic(model: ModelProto, size: int) -> ModelProto | None:
    """A copy of `model` whose first dimensions of `size` are called `batch`, or None when it cannot be.

    Shapes that were written into Reshape nodes are the usual obstacle: the batch in them becomes "the
    rest" or "as before". Nothing here proves that the result is right.
    """
    if weight_bytes(model) > INLINE_LIMIT_BYTES:
        return None
    copy = copy_model(model)
    graph = copy.graph
    taken = {d.dim_param for v in [*graph.input, *graph.output] for d in v.type.tensor_type.shape.dim}
    name = unused_name("batch", taken)
    for value in [*graph.input, *graph.output]:
        dim = value.type.tensor_type.shape.dim[0]
        dim.Clear()
        dim.dim_param = name
    del graph.value_info[:]
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in constants:
            shape = _free_batch(numpy_helper.to_array(constants[node.input[1]]), size)
            if shape is not None:
                _replace(copy, node, shape)
        elif node.op_type in ("LSTM", "GRU", "RNN"):
            _drop_zero_states(node, constants)
    drop_unused(graph)
    infer_shapes(copy)
    return copy


def _free_batch(shape: Array, size: int) -> Array | None:
    """`[8, 256]` → `[-1, 256]`, `[8, -1]` → `[0, -1]`."""
    if shape.ndim != 1 or not shape.size or shape[0] != size:
        return None
    freed = shape.copy()
    freed[0] = 0 if -1 in shape[1:] else -1
    return freed


def _replace(model: ModelProto, node: NodeProto, shape: Array) -> None:
    tensor = numpy_helper.from_array(shape.astype(np.int64), f"{node.output[0]}_free_shape")
    model.graph.initializer.append(tensor)
    node.input[1] = tensor.name


def _drop_zero_states(node: NodeProto, constants: dict[str, TensorProto]) -> None:
    """Initial states of zeros are the default, and the default has no batch in it."""
    for position in (5, 6):
        state = constants.get(node.input[position]) if len(node.input) > position else None
        if state is not None and not numpy_helper.to_array(state).any():
            node.input[position] = ""
