"""Which nodes can run in INT8 or FP8, by TensorRT's rules for Q/DQ graphs.

All inputs of a weighted operator are quantized, its output is not; the bias stays in float. The
shortcut of a residual Add is quantized when the other summand comes straight from a convolution,
because the two then run as one kernel that reads the shortcut in INT8. Everything else (softmax,
normalizations, activations, embedding gathers, recurrent layers) stays in float: a Q/DQ pair there
splits fusions and buys nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from onnx import ModelProto, NodeProto

from vernier.builder.graphs.graph import GraphView, attribute
from vernier.builder.graphs.store import all_graphs

CONVOLUTIONS = ("Conv", "ConvTranspose")
WEIGHTED = (*CONVOLUTIONS, "MatMul", "Gemm")
RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class QuantizableNode:
    """A node that may run in a quantized type.

    activations: the values that get a Q/DQ pair, without repetition.
    weight: the constant operand as the node reads it, None where there is none (attention's products,
        residual sums).
    macs: multiply-accumulate operations of one row; 0 for a residual sum.
    weight_bytes: size of the constant operand in FP32.
    """

    name: str
    op_type: str
    activations: tuple[str, ...]
    weight: str | None
    macs: int
    weight_bytes: int


def weight_position(view: GraphView, node: NodeProto) -> int | None:
    """Which of the first two inputs is the constant operand; None when neither is."""
    if node.op_type in CONVOLUTIONS:
        return 1
    constant = [position for position in (0, 1) if view.is_constant(node.input[position])]
    return constant[0] if len(constant) == 1 else None


def weight_axis(view: GraphView, node: NodeProto) -> int | None:
    """The axis of the weight that counts output channels, or None for one scale for the whole tensor.

    A transposed convolution stores [in, out / groups, …]: with groups one scale along axis 1 would be
    shared by unrelated channels, and TensorRT expects one per channel, so the whole tensor gets one.
    The same holds for a constant left operand and for a stack of matrices.
    """
    position = weight_position(view, node)
    if position is None:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if int(attribute(node, "group", 1)) == 1 else None
    if position == 0:
        return None
    if node.op_type == "Gemm":
        return 0 if int(attribute(node, "transB", 0)) else 1
    return 1 if len(view.shapes_of(node.input[1])) == 2 else None


def shortcut(view: GraphView, node: NodeProto) -> tuple[int, NodeProto] | None:
    """For a residual Add: the input position of the shortcut and the convolution fused with the Add."""
    if node.op_type != "Add" or len(node.input) != 2 or node.input[0] == node.input[1]:
        return None
    found = None
    for position in (0, 1):
        maker = view.maker(node.input[position])
        if (
            maker is not None
            and maker.op_type in CONVOLUTIONS
            and len(view.readers[node.input[position]]) == 1
            and node.input[position] not in view.outputs
            and not view.is_constant(node.input[1 - position])
            and view.shapes.get(node.input[0]) == view.shapes.get(node.input[1])
            and view.is_float(node.input[1 - position])
        ):
            # Where both summands are convolutions, the later one is the block's own: it runs last.
            found = (1 - position, maker) if found is None or _later(view, maker, found[1]) else found
    return found


def _later(view: GraphView, node: NodeProto, other: NodeProto) -> bool:
    return view.makers[node.output[0]] > view.makers[other.output[0]]


def quantizable_nodes(model: ModelProto, dims: Mapping[str, int] | None = None) -> list[QuantizableNode]:
    """The nodes that TensorRT can run in INT8, in graph order.

    Args:
        dims: sizes of named dimensions for the operation counts; 1 where it does not say, so that
            counts are per row of the batch.
    """
    view = GraphView(model)
    found = []
    for node in view.nodes:
        if node.domain not in ("", "ai.onnx"):
            continue
        described = _describe(view, node, dims or {})
        if described is not None:
            found.append(described)
    weighted = {n.name for n in found if n.op_type != "Add"}
    return [n for n in found if n.op_type != "Add" or _fused_with(view, n) in weighted]


def _fused_with(view: GraphView, described: QuantizableNode) -> str:
    found = shortcut(view, view.by_name[described.name])
    return found[1].name if found else ""


def _describe(view: GraphView, node: NodeProto, dims: Mapping[str, int]) -> QuantizableNode | None:
    if node.op_type == "Add":
        found = shortcut(view, node)
        if found is None or _already_quantized(view, node.input[found[0]]):
            return None
        return QuantizableNode(node.name, "Add", (node.input[found[0]],), None, 0, 0)
    if node.op_type not in WEIGHTED or len(node.input) < 2:
        return None
    operands = list(node.input[:2])
    if not all(view.is_float(name) for name in operands):
        return None
    position = weight_position(view, node)
    constant = [view.is_constant(name) for name in operands]
    if all(constant) or (node.op_type in CONVOLUTIONS and constant != [False, True]):
        return None
    weight = None if position is None else operands[position]
    if weight is not None and len(view.shapes_of(weight)) < 2:
        return None
    activations = tuple(dict.fromkeys(name for name in operands if name != weight))
    if any(_already_quantized(view, name) for name in operands):
        return None
    return QuantizableNode(
        name=node.name,
        op_type=node.op_type,
        activations=activations,
        weight=weight,
        macs=_macs(view, node, dims),
        weight_bytes=4 * prod(int(s) for s in view.shapes_of(weight)) if weight else 0,
    )


def _already_quantized(view: GraphView, name: str) -> bool:
    """Models from quantization-aware training bring their own Q/DQ nodes, which stay as they are."""
    maker = view.maker(name)
    return maker is not None and maker.op_type == "DequantizeLinear"


def _macs(view: GraphView, node: NodeProto, dims: Mapping[str, int]) -> int:
    left, right = (view.sizes(name, dims) for name in node.input[:2])
    out = view.sizes(node.output[0], dims)
    if not left or not right or out is None:
        return 0
    if node.op_type == "Conv":
        return prod(out) * prod(right[1:])
    if node.op_type == "ConvTranspose":
        return prod(left) * prod(right[1:])
    inner = left[0] if node.op_type == "Gemm" and attribute(node, "transA", 0) else left[-1]
    return prod(out) * inner


def float_notes(model: ModelProto) -> tuple[str, ...]:
    """Sentences for the report about what looks quantizable and stays in float, and why."""
    recurrent = [n.name for n in model.graph.node if n.op_type in RECURRENT]
    inner = [
        node.name
        for graph in all_graphs(model.graph)
        if graph is not model.graph
        for node in graph.node
        if node.op_type in (*WEIGHTED, *RECURRENT)
    ]
    notes = []
    if recurrent:
        notes.append(
            f"{len(recurrent)} recurrent layers ({', '.join(recurrent[:3])}{', …' if recurrent[3:] else ''}) "
            f"stay in float: their errors feed back into themselves, and TensorRT has no INT8 kernel for them"
        )
    if inner:
        notes.append(f"{len(inner)} nodes inside loops or branches stay in FP32")
    return tuple(notes)
