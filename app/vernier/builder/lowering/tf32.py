"""FP32 as tensor cores compute it with TF32 allowed: operands of products lose 13 of their 23 mantissa bits.

A CPU has no such unit, so the rounding is written into the graph: Veltkamp's splitting (Dekker 1971),
c = 8193·x, c − (c − x), leaves the upper 11 bits of a float32, rounded to nearest. Sums stay FP32.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vernier.builder.graphs.simplify import keep_nodes
from vernier.builder.graphs.store import copy_model
from vernier.builder.nodes.placement import WEIGHTED
from vernier.tensors import Array

_SPLIT = np.float32(2.0**13 + 1)


def round_to_tf32(values: Array) -> Array:
    """float32 rounded to TF32's 10 explicit mantissa bits; numbers above 4e34 would overflow and stay."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = values * _SPLIT
        rounded = scaled - (scaled - values)
    return np.where(np.isfinite(rounded), rounded, values).astype(np.float32)


def emulate_tf32(model: ModelProto) -> ModelProto:
    """A copy of a prepared FP32 model whose convolutions and matrix products round their operands to TF32.

    Loop bodies and recurrent layers are left as they are: TensorRT keeps those in FP32.
    """
    copy = copy_model(model)
    graph = copy.graph
    constants = {t.name: t for t in graph.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info]}
    rounded: dict[str, str] = {}
    nodes: list[NodeProto] = []
    graph.initializer.append(numpy_helper.from_array(np.asarray(_SPLIT), "vernier.tf32.split"))
    for node in graph.node:
        if node.op_type in WEIGHTED:
            for position, name in enumerate(node.input[:2]):
                if (
                    name in constants
                    and constants[name].data_type == TensorProto.FLOAT
                    and name not in rounded
                ):
                    rounded[name] = f"{name}/tf32"
                    values = round_to_tf32(numpy_helper.to_array(constants[name]))
                    graph.initializer.append(numpy_helper.from_array(values, rounded[name]))
                elif types.get(name) == TensorProto.FLOAT and name not in rounded:
                    rounded[name] = f"{name}/tf32"
                    nodes += _rounding(name, rounded[name])
                node.input[position] = rounded.get(name, name)
        nodes.append(node)
    keep_nodes(graph, nodes)
    return copy


def _rounding(name: str, result: str) -> list[NodeProto]:
    scaled, rest = f"{name}/tf32 scaled", f"{name}/tf32 rest"
    return [
        helper.make_node("Mul", [name, "vernier.tf32.split"], [scaled], name=f"vernier scale {name}"),
        helper.make_node("Sub", [scaled, name], [rest], name=f"vernier rest {name}"),
        helper.make_node("Sub", [scaled, rest], [result], name=f"vernier round {name}"),
    ]
