"""Writes a graph node by node in given types: casts where types meet, Q/DQ pairs, stored weights.

Each value is cast, quantized or stored at most once per type, right before its first reader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vernier.builder.graphs.graph import GraphView, attribute
from vernier.builder.graphs.opset import value_names
from vernier.builder.graphs.simplify import reads
from vernier.builder.graphs.store import copy_node, unused_name
from vernier.builder.lowering.quantized import (
    FP8_MAX,
    INT8_MAX,
    QuantizedWeight,
    fit_fp16,
    fp16_scale,
    round_scale,
    spread,
)
from vernier.builder.nodes.floats import BFLOAT16, FLOAT, FLOAT16, Narrowing
from vernier.builder.nodes.placement import (
    CONVOLUTIONS,
    QuantizableNode,
    shortcut,
    weight_axis,
    weight_position,
)
from vernier.tensors import Array

_SUFFIX = {FLOAT: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}
_INT8, _FP8 = int(TensorProto.INT8), int(TensorProto.FLOAT8E4M3FN)
_STORAGE = {"int8": _INT8, "fp8": _FP8}


def to_tensor(array: Array, elem_type: int, name: str) -> TensorProto:
    """A tensor of `elem_type` with the values of a NumPy array."""
    kind = helper.tensor_dtype_to_np_dtype(elem_type)
    with np.errstate(over="ignore"):  # `floats.fits` has kept nodes with constants out of range in FP32
        return numpy_helper.from_array(np.ascontiguousarray(array).astype(kind).reshape(array.shape), name)


class Emitter:
    """Collects the nodes and constants of the new graph; nodes must come in graph order.

    Args:
        view: the graph that is rewritten.
        narrow: what becomes `base`, by node name (see `floats.assign`).
        float_weights: store weights in FP32 with a whole Q/DQ pair, as TensorRT below 10 wants them.
    """

    def __init__(
        self, view: GraphView, narrow: Mapping[str, Narrowing], base: int, float_weights: bool
    ) -> None:
        self._view = view
        self._narrow = narrow
        self._base = base
        self._float_weights = float_weights
        self._taken = value_names(view.model) | {node.name for node in view.nodes}
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._made: dict[str, int] = {}
        self._twins: dict[tuple[object, ...], str] = {}

    # --- nodes ---------------------------------------------------------------------------------
    def plain(self, node: NodeProto) -> None:
        """A node that is not quantized, in its own type."""
        self._append(copy_node(node), node, {})

    def quantized(
        self,
        node: NodeProto,
        described: QuantizableNode,
        kind: str,
        ranges: Mapping[str, float],
        weight: QuantizedWeight | None,
    ) -> None:
        """A node that reads quantized operands; `kind` is `int8` or `fp8`."""
        made = self._type_of(node)
        position = weight_position(self._view, node) if described.weight else None
        if node.op_type == "Add":
            found = shortcut(self._view, node)
            operands = [found[0]] if found else []
        else:
            operands = [p for p in (0, 1) if p != position]
        replaced = {p: self._dequantized(node.input[p], made, kind, ranges[node.input[p]]) for p in operands}
        if position is not None:
            replaced[position] = self._stored(node, position, made, kind, weight)
        copy = copy_node(node)
        correction = weight.bias_correction if weight is not None and kind == "int8" else None
        if correction is None or self._fold_correction(copy, replaced, correction, made):
            self._append(copy, node, replaced)
        else:
            self._append_corrected(copy, node, replaced, correction, made)

    def _type_of(self, node: NodeProto) -> int:
        return self._base if node.name in self._narrow else FLOAT

    def _append(self, copy: NodeProto, node: NodeProto, replaced: Mapping[int, str]) -> None:
        """Reads and writes every value in the type that the node has for it."""
        narrowing = self._narrow.get(node.name)
        for position, name in enumerate(copy.input):
            if position in replaced:
                copy.input[position] = replaced[position]
            elif name and self._view.is_float(name):
                narrow = narrowing is not None and position in narrowing.inputs
                copy.input[position] = self._value(name, self._base if narrow else FLOAT)
        outputs = narrowing.outputs if narrowing is not None else set()
        for position in outputs:
            name = copy.output[position]
            self._made[name] = self._base
            copy.output[position] = self._twins[name, self._base] = self._fresh(
                f"{name}.{_SUFFIX[self._base]}"
            )
        if outputs and node.op_type == "Cast":
            _set(copy, "to", self._base)
        if outputs and node.op_type == "ConstantOfShape":
            self._retype_fill(copy)
        self._nodes.append(copy)
        for position in sorted(outputs):
            name = node.output[position]
            if name in self._view.outputs or name in self._view.captured:
                self._value(name, FLOAT)

    def _retype_fill(self, copy: NodeProto) -> None:
        value = attribute(copy, "value", None)
        fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
        _set(copy, "value", to_tensor(fill, self._base, ""))

    # --- values --------------------------------------------------------------------------------
    def _fresh(self, hint: str) -> str:
        return unused_name(hint, self._taken)

    def _value(self, name: str, wanted: int) -> str:
        """The name under which the float value `name` is there in the type `wanted`."""
        made = self._made.get(name, FLOAT)
        if wanted == FLOAT and made == FLOAT:
            return name
        if (name, wanted) in self._twins:
            return self._twins[name, wanted]
        if name in self._view.constants:
            twin = self._fresh(f"{name}.{_SUFFIX[wanted]}")
            array = numpy_helper.to_array(self._view.constants[name])
            self._constants[twin] = to_tensor(array, wanted, twin)
        else:
            twin = name if wanted == FLOAT else self._fresh(f"{name}.{_SUFFIX[wanted]}")
            self._op("Cast", [self._value(name, made)], twin, to=wanted)
        self._twins[name, wanted] = twin
        return twin

    def _op(self, op_type: str, inputs: list[str], output: str, **attributes: int) -> str:
        node = helper.make_node(op_type, inputs, [output], name=self._fresh(f"{output}/{op_type}"))
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self._nodes.append(node)
        return output

    def _constant(self, array: Array, elem_type: int, hint: str) -> str:
        """A constant, shared with every equal one of the same type."""
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        key = (digest, array.dtype.str, array.shape, elem_type)
        if key not in self._twins:
            name = self._fresh(hint)
            self._constants[name] = to_tensor(array, elem_type, name)
            self._twins[key] = name
        return self._twins[key]

    def _zero(self, like: Array, kind: str) -> str:
        return self._constant(np.zeros(like.shape, np.int8), _STORAGE[kind], f"zero.{kind}")

    # --- quantized operands --------------------------------------------------------------------
    def _dequantized(self, name: str, wanted: int, kind: str, scale: float) -> str:
        """The activation `name` after its Q/DQ pair, in the type `wanted`.

        Readers of different types get a pair each, of one type throughout. TensorRT-RTX joins products that
        read the same integers into one kernel, and fails to compile it when their results differ in type.
        """
        key = (name, wanted, kind)
        if key in self._twins:
            return self._twins[key]
        limit = FP8_MAX if kind == "fp8" else INT8_MAX
        number = round_scale(scale * INT8_MAX / limit, up=False)
        if wanted == FLOAT16:
            number = fp16_scale(number)
        zero = self._zero(number, kind)
        suffix = _SUFFIX[wanted]
        factor = self._constant(number, wanted, f"{name}.scale")
        quantized = self._op(
            "QuantizeLinear", [self._value(name, wanted), factor, zero], self._fresh(f"{name}.{kind}")
        )
        self._twins[key] = self._op(
            "DequantizeLinear", [quantized, factor, zero], self._fresh(f"{name}.{kind}.{suffix}")
        )
        return self._twins[key]

    def _stored(
        self, node: NodeProto, position: int, wanted: int, kind: str, weight: QuantizedWeight | None
    ) -> str:
        """The weight of `node` from its quantized form, in the type `wanted`."""
        name = node.input[position]
        if kind == "fp8":
            values, scales, axis = self._fp8(node, name)
        else:
            assert weight is not None  # `lower` has checked
            values, scales, axis = weight.values, weight.scales, weight.axis
        if wanted == FLOAT16:
            values, scales = fit_fp16(values, scales, axis)
        scale = self._constant(scales, wanted, f"{name}.scale")
        zero = self._zero(scales, kind)
        along = {"axis": axis} if scales.ndim else {}
        if self._float_weights and weight is not None:
            stored = self._constant(weight.dequantized(), FLOAT, f"{name}.grid")
            stored = self._once("QuantizeLinear", [stored, scale, zero], f"{name}.{kind}", along)
        else:
            stored = self._constant(values, _STORAGE[kind], f"{name}.{kind}")
        return self._once(
            "DequantizeLinear", [stored, scale, zero], f"{name}.{kind}.{_SUFFIX[wanted]}", along
        )

    def _once(self, op_type: str, inputs: list[str], output: str, along: Mapping[str, int]) -> str:
        key = (op_type, *inputs, *along.values())
        if key not in self._twins:
            self._twins[key] = self._op(op_type, inputs, self._fresh(output), **along)
        return self._twins[key]

    def _fp8(self, node: NodeProto, name: str) -> tuple[Array, Array, int]:
        """Rounded to the nearest FP8 (E4M3) number; the largest magnitude of a channel becomes 448."""
        value = self._view.constant(name)
        assert value is not None  # placement has seen it
        axis = weight_axis(self._view, node)
        others = tuple(i for i in range(value.ndim) if i != axis) if axis is not None else None
        scales = round_scale(np.abs(value).max(axis=others) / FP8_MAX)
        grid = np.clip(value / spread(scales, value.ndim, axis or 0), -FP8_MAX, FP8_MAX)
        return grid.astype(np.float32), scales, axis or 0

    # --- bias correction -----------------------------------------------------------------------
    def _fold_correction(
        self, copy: NodeProto, replaced: dict[int, str], correction: Array, wanted: int
    ) -> bool:
        """Adds the correction to the node's own bias. False when it has none that could take it."""
        if copy.op_type not in (*CONVOLUTIONS, "Gemm"):
            return False
        name = copy.input[2] if len(copy.input) > 2 else ""
        bias = self._view.constant(name) if name in self._view.constants else None
        factor = float(attribute(copy, "beta", 1.0)) if copy.op_type == "Gemm" else 1.0
        if name and (bias is None or bias.size not in (1, correction.size) or not factor):
            return False
        if bias is not None and bias.size == correction.size and bias.shape[-1:] != correction.shape:
            return False
        total = correction / (factor or 1.0) + (0 if bias is None else bias.reshape(-1))
        if len(copy.input) < 3:
            copy.input.append("")
        if not name and copy.op_type == "Gemm":
            _set(copy, "beta", 1.0)
            total = correction
        replaced[2] = self._constant(total.astype(np.float32), wanted, f"{copy.output[0]}.bias")
        return True

    def _append_corrected(
        self, copy: NodeProto, node: NodeProto, replaced: Mapping[int, str], correction: Array, wanted: int
    ) -> None:
        """An Add behind the node, for nodes without a bias of their own."""
        self._append(copy, node, replaced)
        spatial = len(self._view.shapes_of(node.input[1])) - 2 if node.op_type in CONVOLUTIONS else 0
        added = self._constant(correction.reshape(-1, *[1] * spatial), wanted, f"{node.output[0]}.correction")
        place = next(i for i in range(len(self._nodes) - 1, -1, -1) if self._nodes[i].name == node.name)
        final = self._nodes[place].output[0]
        raw = self._nodes[place].output[0] = self._fresh(f"{final}.uncorrected")
        adding = helper.make_node("Add", [raw, added], [final], name=self._fresh(f"{node.name}.correction"))
        self._nodes.insert(place + 1, adding)

    # --- the end -------------------------------------------------------------------------------
    def finish(self, frame: ModelProto) -> ModelProto:
        """The new model: inputs, outputs, opsets and metadata of `frame`, and what its outputs need."""
        needed = set(self._view.outputs)
        kept: list[NodeProto] = []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(reads(node))
        model = ModelProto(ir_version=frame.ir_version)
        model.opset_import.extend(frame.opset_import)
        model.metadata_props.extend(frame.metadata_props)
        graph = model.graph
        graph.name = frame.graph.name or "model"
        graph.input.extend(frame.graph.input)
        graph.output.extend(frame.graph.output)
        graph.node.extend(reversed(kept))
        for source in (self._view.constants, self._constants):
            graph.initializer.extend(tensor for name, tensor in source.items() if name in needed)
        return model


def _set(node: NodeProto, name: str, value: int | float | TensorProto) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
