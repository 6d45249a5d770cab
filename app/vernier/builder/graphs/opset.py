"""Raises a model from opset 7 or later to at most 19, without changing its answers.

ONNX's own converter skips the bodies of If and Loop, wants shapes that old files lack, and has no
adapter for some steps. Between opset 7 and 19 only the operators below changed in a way that an old
node would not survive; a test compares this table with the schemas of the installed `onnx`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vernier.builder.graphs.simplify import keep_nodes
from vernier.builder.graphs.store import all_graphs, subgraphs, unused_name
from vernier.errors import BuildError
from vernier.tensors import Array

OLDEST_OPSET = 7
#: What `prepare` aims at: TensorRT 8.5's parser ends at 17.
TARGET_OPSET = 17

Adapter = Callable[["Scope", NodeProto], list[NodeProto]]


@dataclass
class Scope:
    """One graph while its nodes are rewritten."""

    graph: GraphProto
    taken: set[str]
    ranks: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def fresh(self, hint: str) -> str:
        return unused_name(hint, self.taken)

    def constant(self, values: object, dtype: type, hint: str) -> str:
        tensor = numpy_helper.from_array(np.asarray(values, dtype), self.fresh(hint))
        self.graph.initializer.append(tensor)
        self.constants[tensor.name] = tensor
        return tensor.name

    def value(self, name: str) -> Array | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def float_type(self, name: str) -> type:
        """The floating-point type of a value, float32 where the model does not say."""
        kinds: dict[int, type] = {TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}
        return kinds.get(self.types.get(name, 0), np.float32)


def take_attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """Removes an attribute and returns it."""
    for position, attribute in enumerate(node.attribute):
        if attribute.name == name:
            found = AttributeProto()
            found.CopyFrom(attribute)
            del node.attribute[position]
            return found
    return None


def get_attribute(node: NodeProto, name: str) -> AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def _append_input(node: NodeProto, position: int, name: str) -> None:
    while len(node.input) <= position:
        node.input.append("")
    node.input[position] = name


def _attributes_to_inputs(*moves: tuple[str, int, type | None]) -> Adapter:
    """Each (attribute, input position, type) becomes a constant input; no type: that of the data."""

    def adapt(scope: Scope, node: NodeProto) -> list[NodeProto]:
        for name, position, dtype in moves:
            attribute = take_attribute(node, name)
            if attribute is None:
                continue
            dtype = dtype or scope.float_type(node.input[0])
            values = list(attribute.ints) or list(attribute.floats)
            if attribute.type == AttributeProto.FLOAT:
                constant = scope.constant(attribute.f, dtype, f"{node.output[0]}_{name}")
            elif attribute.type == AttributeProto.INT:
                constant = scope.constant([attribute.i], dtype, f"{node.output[0]}_{name}")
            else:
                constant = scope.constant(values, dtype, f"{node.output[0]}_{name}")
            _append_input(node, position, constant)
        return [node]

    return adapt


def _drop_attribute(name: str) -> Adapter:
    def adapt(_: Scope, node: NodeProto) -> list[NodeProto]:
        take_attribute(node, name)
        return [node]

    return adapt


def _batch_normalization_9(_: Scope, node: NodeProto) -> list[NodeProto]:
    spatial = take_attribute(node, "spatial")
    if spatial is not None and not spatial.i:
        raise BuildError(
            f"BatchNormalization '{node.name or node.output[0]}' has spatial=0, which ONNX dropped in opset 9: "
            f"export the model again with opset 9 or later"
        )
    return [node]


def _batch_normalization_14(_: Scope, node: NodeProto) -> list[NodeProto]:
    del node.output[1:]
    return [node]


def _upsample(scope: Scope, node: NodeProto) -> list[NodeProto]:
    """To Resize of opset 11; ONNX Runtime and the exporters sampled asymmetrically."""
    scales = take_attribute(node, "scales")
    if scales is not None:
        _append_input(node, 1, scope.constant(list(scales.floats), np.float32, f"{node.output[0]}_scales"))
    node.op_type = "Resize"
    return _resize_11(scope, node)


def _resize_11(scope: Scope, node: NodeProto) -> list[NodeProto]:
    data, scales = node.input[0], node.input[1]
    roi = scope.constant([], np.float32, f"{node.output[0]}_roi")
    del node.input[:]
    node.input.extend([data, roi, scales])
    node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
    node.attribute.append(helper.make_attribute("nearest_mode", "floor"))
    return [node]


def _scatter(_: Scope, node: NodeProto) -> list[NodeProto]:
    node.op_type = "ScatterElements"
    return [node]


def _scan_9(_: Scope, node: NodeProto) -> list[NodeProto]:
    raise BuildError(
        f"Scan '{node.name or node.output[0]}' has the form that ONNX dropped in opset 9: "
        f"export the model again with opset 9 or later"
    )


def _softmax_13(scope: Scope, node: NodeProto) -> list[NodeProto]:
    """Before 13 the axes from `axis` on were flattened into one."""
    attribute = take_attribute(node, "axis")
    axis = 1 if attribute is None else attribute.i
    data, result = node.input[0], node.output[0]
    rank = scope.ranks.get(data)
    node.attribute.append(helper.make_attribute("axis", -1))
    if axis == -1 or (rank is not None and axis % rank == rank - 1):
        return [node]
    shape, flat, soft = (scope.fresh(f"{result}_{part}") for part in ("shape", "flat", "soft"))
    node.input[0], node.output[0] = flat, soft
    return [
        helper.make_node("Shape", [data], [shape]),
        helper.make_node("Flatten", [data], [flat], axis=axis),
        node,
        helper.make_node("Reshape", [soft, shape], [result]),
    ]


def _split_18(_: Scope, node: NodeProto) -> list[NodeProto]:
    if len(node.input) < 2 or not node.input[1]:
        node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
    return [node]


REDUCE_18 = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip
_I = np.int64
_axes = _attributes_to_inputs(("axes", 1, _I))

#: opset at which an operator changed → operator → what makes an older node right there
ADAPTERS: dict[int, dict[str, Adapter]] = {
    9: {"BatchNormalization": _batch_normalization_9, "Scan": _scan_9},
    10: {
        "Slice": _attributes_to_inputs(("starts", 1, _I), ("ends", 2, _I), ("axes", 3, _I)),
        "TopK": _attributes_to_inputs(("k", 1, _I)),
    },
    11: {
        "Clip": _attributes_to_inputs(("min", 1, None), ("max", 2, None)),
        "Pad": _attributes_to_inputs(("pads", 1, _I), ("value", 2, None)),
        "Resize": _resize_11,
        "Upsample": _upsample,
        "Scatter": _scatter,
    },
    12: {"Dropout": _drop_attribute("ratio")},
    13: {
        **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax_13),
        **dict.fromkeys(("Squeeze", "Unsqueeze", "ReduceSum"), _axes),
        "Split": _attributes_to_inputs(("split", 1, _I)),
    },
    14: {"BatchNormalization": _batch_normalization_14},
    18: {**dict.fromkeys(REDUCE_18, _axes), "Split": _split_18},
}


def opset_of(model: ModelProto) -> int:
    """The opset of ONNX's own operators; 0 when the model uses none."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def set_opset(model: ModelProto, version: int) -> None:
    """Relabels the model; nothing else."""
    others = [(o.domain, o.version) for o in model.opset_import if o.domain not in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", version))
    model.opset_import.extend(helper.make_opsetid(domain, v) for domain, v in others)


def value_names(model: ModelProto) -> set[str]:
    names: set[str] = set()
    for graph in all_graphs(model.graph):
        names.update(t.name for t in graph.initializer)
        names.update(v.name for v in graph.input)
        names.update(o for node in graph.node for o in node.output)
    return names


def _stated(model: ModelProto) -> tuple[dict[str, int], dict[str, int]]:
    """Ranks and element types of the values for which the model states them."""
    graph = model.graph
    kinds = {v.name: v.type.tensor_type for v in [*graph.input, *graph.value_info, *graph.output]}
    ranks = {name: len(kind.shape.dim) for name, kind in kinds.items() if kind.HasField("shape")}
    types = {name: kind.elem_type for name, kind in kinds.items()}
    for tensor in graph.initializer:
        ranks[tensor.name], types[tensor.name] = len(tensor.dims), tensor.data_type
    return ranks, types


def raise_opset(model: ModelProto, target: int) -> None:
    """Raises the model in place to `target` (at most 19). A model that is there already stays as it is.

    Raises:
        BuildError: older than opset 7, or a node that no later opset can express.
    """
    current = opset_of(model)
    if current >= target or not current:
        return
    if current < OLDEST_OPSET:
        raise BuildError(
            f"the model has opset {current}; opsets from {OLDEST_OPSET} on are read: "
            f"export it again with opset {TARGET_OPSET}"
        )
    ranks, types = _stated(model)
    scope = Scope(model.graph, value_names(model), ranks, types)
    for step in range(current + 1, target + 1):
        if step in ADAPTERS:
            _rewrite(scope, ADAPTERS[step])
    set_opset(model, target)


def _rewrite(scope: Scope, adapters: dict[str, Adapter]) -> None:
    graph = scope.graph
    scope.constants.update({t.name: t for t in graph.initializer})
    if any(node.op_type in adapters and node.domain in ("", "ai.onnx") for node in graph.node):
        nodes: list[NodeProto] = []
        for node in graph.node:
            adapter = adapters.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            nodes.extend(adapter(scope, node) if adapter else [node])
        keep_nodes(graph, nodes)
    for node in graph.node:
        for body in subgraphs(node):
            _rewrite(replace(scope, graph=body, constants=dict(scope.constants)), adapters)
