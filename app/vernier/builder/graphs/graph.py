"""A read-only index of an ONNX graph: who makes a value, who reads it, what type and shape it has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vernier.builder.graphs.simplify import reads
from vernier.builder.graphs.store import subgraphs
from vernier.tensors import Array

#: Operators that hand a constant on with its values unchanged.
_CARRIERS = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}


class GraphView:
    """The top-level graph of `model`, indexed once; the model must not change while the view is used.

    Attributes:
        nodes: in graph order.
        by_name: node name → node.
        constants: initializer name → tensor.
        makers: value name → index of the node that makes it.
        readers: value name → (node index, input position), in graph order.
        captured: names that bodies of If, Loop or Scan read from outside.
        types: value name → `TensorProto.DataType` number, as far as the model states it.
        shapes: value name → sizes; a symbolic or unknown size is its name, possibly empty.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.model = model
        self.nodes: list[NodeProto] = list(graph.node)
        self.by_name = {node.name: node for node in self.nodes}
        self.constants: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        self.inputs = {v.name for v in graph.input if v.name not in self.constants}
        self.outputs = {v.name for v in graph.output}
        self.makers: dict[str, int] = {}
        self.readers: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.captured: set[str] = set()
        for index, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self.makers[name] = index
            for position, name in enumerate(node.input):
                if name:
                    self.readers[name].append((index, position))
            for body in subgraphs(node):
                for inner in body.node:
                    self.captured.update(reads(inner))
                self.captured.update(output.name for output in body.output)
        self.types: dict[str, int] = {t.name: t.data_type for t in graph.initializer}
        self.shapes: dict[str, tuple[int | str, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            kind = value.type.tensor_type
            if kind.elem_type:
                self.types[value.name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[value.name] = tuple(
                    d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim
                )

    def is_float(self, name: str) -> bool:
        return self.types.get(name) == TensorProto.FLOAT

    def maker(self, name: str) -> NodeProto | None:
        index = self.makers.get(name)
        return None if index is None else self.nodes[index]

    def is_constant(self, name: str) -> bool:
        """Whether `constant` would give a value."""
        while name not in self.constants:
            node = self.maker(name)
            if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _CARRIERS:
                return False
            if any(extra not in self.constants for extra in node.input[1:] if extra):
                return False
            name = node.input[0]
        return True

    def constant(self, name: str) -> Array | None:
        """The value of an initializer, also one that reaches the reader through Identity or Transpose."""
        tensor = self.constants.get(name)
        if tensor is not None:
            return numpy_helper.to_array(tensor)
        if not self.is_constant(name):
            return None
        node = self.nodes[self.makers[name]]
        array = self.constant(node.input[0])
        if array is None:
            return None
        return self._carry(node, array)

    def _carry(self, node: NodeProto, array: Array) -> Array:
        kind = node.op_type
        if kind == "Identity":
            return array
        if kind == "Transpose":
            perm = attribute(node, "perm", None)
            return np.transpose(array, perm)
        if kind == "Flatten":
            axis = int(attribute(node, "axis", 1)) % (array.ndim + 1)
            return array.reshape(int(np.prod(array.shape[:axis])), -1)
        if kind == "Reshape":
            target = self._extra(node)
            kept = [array.shape[i] if size == 0 else int(size) for i, size in enumerate(target)]
            return array.reshape(kept)
        axes = tuple(int(a) for a in self._extra(node))
        if kind == "Squeeze":
            return np.squeeze(array, axes or None)
        return np.expand_dims(array, axes)

    def _extra(self, node: NodeProto) -> Array:
        if len(node.input) > 1 and node.input[1]:
            return numpy_helper.to_array(self.constants[node.input[1]])
        return np.asarray(attribute(node, "axes", []), np.int64)

    def shapes_of(self, name: str) -> tuple[int | str, ...]:
        """The shape of a constant as its reader sees it, of any other value as far as it is known."""
        if name not in self.shapes and self.is_constant(name):
            value = self.constant(name)
            self.shapes[name] = () if value is None else value.shape
        return self.shapes.get(name, ())

    def sizes(self, name: str, dims: Mapping[str, int]) -> list[int] | None:
        """The shape with symbolic sizes looked up in `dims` (1 where it does not say), or None."""
        shape = self.shapes.get(name)
        if shape is None:
            return None
        return [max(size, 1) if isinstance(size, int) else dims.get(size, 1) for size in shape]


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, or `default`."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default
