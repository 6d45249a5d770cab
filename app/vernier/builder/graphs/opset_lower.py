"""Takes a model of a late opset down to one that older TensorRT parsers know, where that is exact."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from vernier.builder.graphs.opset import (
    REDUCE_18,
    Scope,
    get_attribute,
    opset_of,
    set_opset,
    take_attribute,
    value_names,
)
from vernier.builder.graphs.store import all_graphs, copy_node


def _inputs_to_attribute(scope: Scope, node: NodeProto, name: str) -> bool:
    """Moves constant input 1 back into an attribute. False when it is no constant."""
    if len(node.input) < 2 or not node.input[1]:
        del node.input[1:]
        return True
    values = scope.value(node.input[1])
    if values is None:
        return False
    del node.input[1:]
    if values.size:
        node.attribute.append(helper.make_attribute(name, [int(v) for v in values.reshape(-1)]))
    return True


def _downgrade(scope: Scope, node: NodeProto, target: int) -> None:
    """Brings a node of opset 18 or later into an older form where that is exact."""
    if target < 18 and node.op_type in REDUCE_18 and not (get_attribute(node, "noop_with_empty_axes")):
        _inputs_to_attribute(scope, node, "axes")
    if target < 18 and node.op_type == "Split" and len(node.input) < 2:
        take_attribute(node, "num_outputs")
    if target < 20 and node.op_type == "GridSample":
        mode = get_attribute(node, "mode")
        renamed = {b"linear": b"bilinear", b"cubic": b"bicubic"}
        if mode is not None and mode.s in renamed:
            mode.s = renamed[mode.s]
    if (
        node.op_type == "Cast"
        and target < 19
        and (saturate := get_attribute(node, "saturate"))
        and saturate.i == 1
    ):
        take_attribute(node, "saturate")


def _fits(node: NodeProto, target: int, types: dict[str, int]) -> bool:
    """Whether the node, as it is, is valid and means the same under opset `target`."""
    try:
        schema = onnx.defs.get_schema(node.op_type, target, "")
    except onnx.defs.SchemaError:
        return False
    if schema.deprecated or not schema.min_input <= len(node.input) <= max(
        schema.max_input, schema.min_input
    ):
        return False
    if any(a.name not in schema.attributes for a in node.attribute):
        return False
    if node.op_type == "GroupNormalization" and target < 21:
        return False  # scale and bias went from one per group to one per channel
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for position, name in enumerate(node.input):
        formal = schema.inputs[min(position, len(schema.inputs) - 1)]
        kind = types.get(name)
        if (
            kind
            and formal.type_str in allowed
            and f"tensor({_onnx_type(kind)})" not in allowed[formal.type_str]
        ):
            return False
    return True


def _onnx_type(elem_type: int) -> str:
    return str(TensorProto.DataType.Name(elem_type)).lower().replace("float32", "float")


def lower_opset(model: ModelProto, targets: Iterable[int]) -> int:
    """Takes a model of a later opset down to the first of `targets` under which every node is valid.

    Returns the opset it has afterwards: unchanged when none fits. Only top-level graphs are lowered.
    """
    current = opset_of(model)
    types = {t.name: t.data_type for t in model.graph.initializer} | {
        v.name: v.type.tensor_type.elem_type
        for v in [*model.graph.input, *model.graph.value_info, *model.graph.output]
    }
    for target in targets:
        if target >= current:
            break
        constants = {t.name: t for t in model.graph.initializer}
        candidates = [copy_node(node) for node in model.graph.node]
        scope = Scope(model.graph, value_names(model), constants=constants)
        for node in candidates:
            if node.domain in ("", "ai.onnx"):
                _downgrade(scope, node, target)
        inner = [n for g in all_graphs(model.graph) for n in g.node if g is not model.graph]
        if all(_fits(n, target, types) for n in [*candidates, *inner] if n.domain in ("", "ai.onnx")):
            del model.graph.node[:]
            model.graph.node.extend(candidates)
            set_opset(model, target)
            return target
    return current
