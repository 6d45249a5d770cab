"""From a precision assignment (node → type) to a graph in which every type is explicit.

`strong`: types by casts, INT8 and FP8 by Q/DQ pairs whose scales have the type around them, weights
stored quantized with their DequantizeLinear alone. TensorRT from 10 on, TensorRT-RTX and ONNX Runtime
take it as it is. `trt8`: for TensorRT below 10, whose parser ends at opset 17 and takes FP32 scales
alone: the same Q/DQ pairs in FP32, and the nodes that must stay FP32 listed in the metadata.

Values keep their names in FP32; a narrow twin has a suffix. So inputs, outputs and everything that a
loop body reads from outside are what they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto

from vernier.builder.graphs.graph import GraphView
from vernier.builder.graphs.opset import opset_of, raise_opset, set_opset
from vernier.builder.graphs.opset_lower import lower_opset
from vernier.builder.graphs.simplify import infer_shapes
from vernier.builder.graphs.store import skeleton
from vernier.builder.lowering.emit import Emitter
from vernier.builder.lowering.quantized import FP16_LEAST, QuantizedWeight
from vernier.builder.nodes.floats import BASES, FLOAT, FP16_MAX, assign
from vernier.builder.nodes.placement import QuantizableNode, quantizable_nodes, shortcut, weight_position
from vernier.errors import BuildError
from vernier.package.onnx_metadata import FP32_NODES

Form = Literal["strong", "trt8"]

_QDQ_OPSET, _BF16_OPSET, _TRT8_OPSET = 19, 22, 17
#: Operators whose meaning or attributes changed between opset 19 and 22.
_CHANGED_AFTER_19 = {"DFT", "GridSample", "GroupNormalization"}


@dataclass(frozen=True)
class Recipe:
    """The precision assignment.

    base: type of everything not named below: `fp32`, `fp16` or `bf16`.
    int8, fp8: names of nodes that run quantized; their surroundings have the node's float type.
    fp32: names of nodes that stay FP32 although the base is narrower. A node may be here and in `int8`:
        then it multiplies in INT8 and gives its result in FP32.
    ranges: activation → INT8 scale (largest magnitude / 127). FP8 uses the same magnitude.
    weights: node name → quantized weight, for the nodes of `int8` that have one.
    """

    base: str = "fp32"
    int8: frozenset[str] = frozenset()
    fp32: frozenset[str] = frozenset()
    ranges: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    fp8: frozenset[str] = frozenset()


def lower(model: ModelProto, recipe: Recipe, form: Form = "strong") -> ModelProto:
    """A new graph that computes `model` as `recipe` says; inputs and outputs keep names and types.

    Raises:
        BuildError: the recipe names nodes that are not there or cannot run so, a range or weight is
            missing, or the form cannot hold the graph.
    """
    nodes = {node.name: node for node in quantizable_nodes(model)}
    _check(model, recipe, nodes, form)
    work = _with_opset(model, recipe, form)
    weights = {t.name: t for t in model.graph.initializer}
    view = GraphView(work)
    view.constants.update({name: tensor for name, tensor in weights.items() if name in view.constants})
    base = FLOAT if form == "trt8" else BASES[recipe.base]
    quantized = _effective(view, recipe)
    exempt = {
        name: {position}
        for name in quantized
        if (position := weight_position(view, view.by_name[name])) is not None and nodes[name].weight
    }
    fp32 = recipe.fp32 | {name for name in quantized if not _fits_fp16(nodes[name], recipe)}
    narrow = assign(view, opset_of(work), base, fp32, exempt)
    emitter = Emitter(view, narrow, base, float_weights=form == "trt8")
    for node in view.nodes:
        kind = quantized.get(node.name)
        if kind is None:
            emitter.plain(node)
        else:
            emitter.quantized(node, nodes[node.name], kind, recipe.ranges, recipe.weights.get(node.name))
    lowered = emitter.finish(work)
    if form == "trt8":
        unconstrained = assign(view, opset_of(work), BASES[recipe.base], fp32, exempt)
        _list_fp32_nodes(lowered, view, unconstrained if recipe.base != "fp32" else None)
    _note(lowered, {"vernier.base": recipe.base})
    return lowered


def _check(model: ModelProto, recipe: Recipe, nodes: Mapping[str, QuantizableNode], form: Form) -> None:
    if recipe.base not in BASES:
        raise BuildError(f"'{recipe.base}' is no base type; choose one of {', '.join(BASES)}")
    if form == "trt8" and (recipe.base == "bf16" or recipe.fp8):
        raise BuildError("TensorRT below 10 has neither BF16 nor FP8 here: build for TensorRT 10 or newer")
    known = {node.name for node in model.graph.node}
    if unknown := sorted((recipe.int8 | recipe.fp8 | recipe.fp32) - known):
        raise BuildError(f"the model has no node '{unknown[0]}', which the precision assignment names")
    if both := sorted(recipe.int8 & recipe.fp8):
        raise BuildError(f"node '{both[0]}' is assigned to INT8 and to FP8: choose one")
    for name in sorted(recipe.int8 | recipe.fp8):
        if name not in nodes:
            raise BuildError(f"node '{name}' cannot run in INT8 or FP8: take it out of the assignment")
        missing = [a for a in nodes[name].activations if a not in recipe.ranges]
        if missing:
            raise BuildError(
                f"no calibrated range for '{missing[0]}', which node '{name}' reads: calibrate it"
            )
        if name in recipe.int8 and nodes[name].weight and name not in recipe.weights:
            raise BuildError(f"no quantized weight for node '{name}': quantize it")


def _effective(view: GraphView, recipe: Recipe) -> dict[str, str]:
    """Node name → `int8` or `fp8`, without residual sums whose convolution runs in float: nothing is fused
    with those, so quantizing their shortcut would only cost accuracy."""
    kinds = {**dict.fromkeys(recipe.int8, "int8"), **dict.fromkeys(recipe.fp8, "fp8")}
    for node in view.nodes:
        if node.name in kinds and node.op_type == "Add":
            found = shortcut(view, node)
            if found is None or kinds.get(found[1].name) != kinds[node.name]:
                del kinds[node.name]
    return kinds


def _fits_fp16(node: QuantizableNode, recipe: Recipe) -> bool:
    """Whether FP16 holds the scales, the dequantized operands and the correction; if not, the node stays FP32."""
    if any(recipe.ranges[name] < FP16_LEAST for name in node.activations):
        return False
    numbers = [128 * recipe.ranges[name] for name in node.activations]
    weight = recipe.weights.get(node.name)
    if weight is not None:
        numbers.append(128 * float(weight.scales.max()))
        if weight.bias_correction is not None:
            numbers.append(float(np.abs(weight.bias_correction).max()))
    return max(numbers) <= FP16_MAX


def _with_opset(model: ModelProto, recipe: Recipe, form: Form) -> ModelProto:
    """A copy without the large weights, at the opset that the form needs."""
    work = skeleton(model)
    before = opset_of(work)
    if form == "trt8":
        if before > _TRT8_OPSET and lower_opset(work, [_TRT8_OPSET]) > _TRT8_OPSET:
            raise BuildError(
                f"the model needs opset {before}, and TensorRT below 10 reads opsets up to {_TRT8_OPSET}: "
                f"serve it with TensorRT 10 or newer"
            )
        work.ir_version = min(work.ir_version, 8)
        return work
    needs = recipe.fp8 or (recipe.int8 and recipe.base != "fp32")
    if recipe.base == "bf16":
        raise_opset(work, _QDQ_OPSET)
        changed = any(node.op_type in _CHANGED_AFTER_19 for node in work.graph.node)
        if opset_of(work) < _BF16_OPSET and not changed:
            set_opset(work, _BF16_OPSET)
        work.ir_version = 10
    elif needs:
        raise_opset(work, _QDQ_OPSET)
        work.ir_version = min(max(work.ir_version, 9), 10)
    if opset_of(work) != before or any(node.output[0] not in _typed(work) for node in work.graph.node):
        infer_shapes(work)
    return work


def _typed(model: ModelProto) -> set[str]:
    return {v.name for v in [*model.graph.value_info, *model.graph.output]}


def _list_fp32_nodes(lowered: ModelProto, view: GraphView, narrow: Mapping[str, object] | None) -> None:
    """What the builder must pin: nodes with a float result that may not be narrowed."""
    if narrow is not None:
        pinned = [n.name for n in view.nodes if n.name not in narrow and any(map(view.is_float, n.output))]
        _note(lowered, {FP32_NODES: json.dumps(pinned)})


def _note(model: ModelProto, entries: Mapping[str, str]) -> None:
    merged = {e.key: e.value for e in model.metadata_props} | dict(entries)
    model.producer_name = "vernier"
    onnx.helper.set_model_props(model, merged)
