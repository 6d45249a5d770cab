"""Which floating-point type each node of a graph computes in, and which of its values follow it.

Decided from ONNX's own operator schemas, so that no operator gets a type that it does not have. A
node whose types are not all known (custom operators, sequences, loop bodies) stays in FP32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from vernier.builder.graphs.graph import GraphView
from vernier.builder.graphs.simplify import RANDOM
from vernier.builder.graphs.store import subgraphs
from vernier.tensors import Array

FLOAT, FLOAT16, BFLOAT16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)
BASES: dict[str, int] = {"fp32": FLOAT, "fp16": FLOAT16, "bf16": BFLOAT16}
_TYPE_TEXT = {FLOAT16: "tensor(float16)", BFLOAT16: "tensor(bfloat16)"}

FP16_MAX = 65504.0
#: A scalar that FP16 changes by a larger share (an epsilon of 1e-8 becomes 0) keeps its node in FP32.
_SCALAR_TOLERANCE = 0.1

#: They have narrow types on paper, but lose what they are there for, or runtimes lack them.
_ALWAYS_FP32 = {
    *RANDOM,
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "NonMaxSuppression", "Range"),
    *("DFT", "STFT", "MelWeightMatrix", "EyeLike", "CastLike", "Det"),
}
#: What TensorRT refuses in BF16: it finds no type for a transposed convolution's result.
_NOT_BF16 = {"ConvTranspose"}
#: Inputs that stay FP32 whatever the node computes in: Resize's region and scales.
_FP32_INPUTS = {"Resize": {1, 2}, "Upsample": {1}}

#: They hand values on without arithmetic: between FP32 neighbours they stay FP32.
MOVEMENT = {
    *("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Pad"),
    *("Slice", "Gather", "GatherElements", "GatherND", "Concat", "Split", "DepthToSpace", "SpaceToDepth"),
    *("MaxPool", "Relu", "Max", "Min", "Neg", "Abs"),
}


@lru_cache(maxsize=4096)
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _formal(
    parameters: list[onnx.defs.OpSchema.FormalParameter], position: int
) -> tuple[str, set[str]] | None:
    """Type variable and allowed types of an argument; the last parameter may be variadic."""
    if not parameters:
        return None
    parameter = parameters[min(position, len(parameters) - 1)]
    return parameter.type_str, set(parameter.types)


class Narrowing:
    """What `node` would read and write in the type `base`.

    inputs, outputs: positions that change from FP32 to `base`; both empty when the node cannot.
    """

    def __init__(self, view: GraphView, node: NodeProto, opset: int, base: int) -> None:
        self.inputs: set[int] = set()
        self.outputs: set[int] = set()
        schema = _schema(node.op_type, opset) if node.domain in ("", "ai.onnx") else None
        names = [name for name in [*node.input, *node.output] if name]
        if (
            schema is None
            or node.op_type in _ALWAYS_FP32
            or (base == BFLOAT16 and node.op_type in _NOT_BF16)
            or any(True for _ in subgraphs(node))
            or any(name not in view.types for name in names)
        ):
            return
        wanted, variables = _TYPE_TEXT[base], set()
        fixed = _FP32_INPUTS.get(node.op_type, set())
        for position, name in enumerate(node.input):
            formal = _formal(list(schema.inputs), position)
            if not name or not view.is_float(name) or formal is None or position in fixed:
                continue
            if wanted not in formal[1]:
                if len(formal[1]) > 1:  # a type variable without the narrow type: the operator lacks it
                    self.inputs.clear()
                    return
                continue
            self.inputs.add(position)
            variables.add(formal[0])
        for position, name in enumerate(node.output):
            formal = _formal(list(schema.outputs), position)
            if not name or not view.is_float(name) or formal is None:
                continue
            if node.op_type in ("Cast", "ConstantOfShape"):
                if wanted in formal[1]:
                    self.outputs.add(position)
            elif formal[0] in variables:
                if wanted not in formal[1]:
                    self.inputs.clear()
                    self.outputs.clear()
                    return
                self.outputs.add(position)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.outputs)


def fits(values: Array, base: int) -> bool:
    """Whether a constant survives in `base`: nothing finite overflows, and no scalar is distorted.

    Infinities stay what they are. Small values in a larger array are left to `half.half_hazards`, which
    looks at what they do.
    """
    if base == FLOAT or values.dtype != np.float32 or not values.size:
        return True
    finite = values[np.isfinite(values)]
    if base == FLOAT16 and finite.size and float(np.abs(finite).max()) > FP16_MAX:
        return False
    if base == FLOAT16 and values.size == 1 and finite.size:
        value = float(finite.reshape(-1)[0])
        return abs(float(np.float16(value)) - value) <= _SCALAR_TOLERANCE * abs(value)
    return True


def assign(
    view: GraphView, opset: int, base: int, fp32: Collection[str], exempt: dict[str, set[int]] | None = None
) -> dict[str, Narrowing]:
    """Node name → what of it becomes `base`, for the nodes that compute in `base`.

    Args:
        fp32: names of nodes that must not.
        exempt: node name → input positions whose constants need not fit (they are stored quantized).
    """
    if base == FLOAT:
        return {}
    narrow: dict[str, Narrowing] = {}
    for node in view.nodes:
        if node.name in fp32 or not _constants_fit(view, node, base, (exempt or {}).get(node.name, set())):
            continue
        found = Narrowing(view, node, opset, base)
        # Float to integer: what is cut off there was computed by the maker, whose type decides.
        if found and not (node.op_type == "Cast" and not found.outputs):
            narrow[node.name] = found
    while stranded := list(_stranded(view, narrow)):
        for name in stranded:
            del narrow[name]
    return narrow


def _constants_fit(view: GraphView, node: NodeProto, base: int, exempt: set[int]) -> bool:
    for position, name in enumerate(node.input):
        if name in view.constants and view.is_float(name) and position not in exempt:
            value = view.constant(name)
            if value is not None and not fits(value, base):
                return False
    return True


def _stranded(view: GraphView, narrow: dict[str, Narrowing]) -> Iterator[str]:
    """Movement nodes between FP32 nodes alone: in the narrow type they would only lose bits."""
    for node in reversed(view.nodes):
        if node.name not in narrow or node.op_type not in MOVEMENT:
            continue
        sources = [n for n in node.input if view.is_float(n) and not view.is_constant(n)]
        from_fp32 = all(_made_in_fp32(view, name, narrow) for name in sources)
        if from_fp32 and all(_read_in_fp32(view, name, narrow) for name in node.output if name):
            yield node.name


def _made_in_fp32(view: GraphView, name: str, narrow: dict[str, Narrowing]) -> bool:
    maker = view.maker(name)
    return maker is None or maker.name not in narrow


def _read_in_fp32(view: GraphView, name: str, narrow: dict[str, Narrowing]) -> bool:
    return all(
        view.nodes[index].name not in narrow or position not in narrow[view.nodes[index].name].inputs
        for index, position in view.readers.get(name, ())
    )
