"""What a search can give back to higher precision, and what keeping it in lower precision is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto

from vernier.builder.graphs.graph import GraphView
from vernier.builder.graphs.opset import opset_of
from vernier.builder.lowering.lower import Recipe
from vernier.builder.nodes.floats import BASES, MOVEMENT, assign
from vernier.builder.nodes.placement import QuantizableNode, shortcut

#: Float nodes are given back in runs of neighbours, so that ranking them takes no longer than this many runs.
_MAX_FLOAT_UNITS = 64
#: Everything is worth something, so that a price can be formed.
_MIN_SAVING = 1e-4
#: A residual sum in INT8 saves reading the shortcut, worth about this part of its convolution.
_SHORTCUT_SHARE = 0.1


@dataclass(frozen=True)
class Unit:
    """Nodes that are given back together.

    nodes: their names.
    with_nodes: quantized nodes without which these have no effect: a residual sum's convolution.
    quantized: True to take them out of INT8 or FP8, False to keep them in FP32 although the base is narrower.
    saving: what low precision saves here: the share of all multiply-accumulates and weight bytes.
    """

    nodes: tuple[str, ...]
    with_nodes: tuple[str, ...]
    quantized: bool
    saving: float


def quantized_units(model: ModelProto, nodes: Sequence[QuantizableNode], recipe: Recipe) -> tuple[Unit, ...]:
    """One unit for each node that `recipe` quantizes, in graph order."""
    view = GraphView(model)
    by_name = {node.name: node for node in view.nodes}
    worth = savings(nodes)
    units = []
    for node in nodes:
        if node.name not in recipe.int8 | recipe.fp8:
            continue
        found = shortcut(view, by_name[node.name]) if node.op_type == "Add" else None
        fused = (found[1].name,) if found else ()
        saving = worth[fused[0]] * _SHORTCUT_SHARE if fused else worth[node.name]
        units.append(Unit((node.name,), fused, True, max(_MIN_SAVING, saving)))
    return tuple(units)


def savings(nodes: Sequence[QuantizableNode]) -> dict[str, float]:
    """Node → mean of its shares of multiply-accumulates (time at large batches) and weight bytes (at small)."""
    macs = sum(node.macs for node in nodes) or 1
    weight_bytes = sum(node.weight_bytes for node in nodes) or 1
    return {node.name: (node.macs / macs + node.weight_bytes / weight_bytes) / 2 for node in nodes}


def kept_macs(nodes: Sequence[QuantizableNode], recipe: Recipe) -> float:
    """The share of all quantizable nodes' multiply-accumulates that `recipe` quantizes."""
    kept = sum(node.macs for node in nodes if node.name in recipe.int8 | recipe.fp8)
    return kept / (sum(node.macs for node in nodes) or 1)


def float_units(model: ModelProto, nodes: Sequence[QuantizableNode], recipe: Recipe) -> tuple[Unit, ...]:
    """Runs of neighbouring nodes that compute in the narrow base type, in graph order."""
    if recipe.base == "fp32":
        return ()
    view = GraphView(model)
    narrow = assign(view, opset_of(model), BASES[recipe.base], recipe.fp32)
    names = [n.name for n in view.nodes if n.name in narrow and n.op_type not in MOVEMENT]
    length = -(-len(names) // _MAX_FLOAT_UNITS) or 1
    worth = savings(nodes)
    units = []
    for start in range(0, len(names), length):
        group = tuple(names[start : start + length])
        saving = sum(worth.get(name, 0.0) for name in group)
        units.append(Unit(group, (), False, max(_MIN_SAVING, saving)))
    return tuple(units)


def without(recipe: Recipe, given: Sequence[Unit]) -> Recipe:
    """`recipe` with these units given back."""
    quantized = {name for unit in given if unit.quantized for name in unit.nodes}
    floats = {name for unit in given if not unit.quantized for name in unit.nodes}
    return replace(
        recipe, int8=recipe.int8 - quantized, fp8=recipe.fp8 - quantized, fp32=recipe.fp32 | floats
    )


def alone(recipe: Recipe, unit: Unit, names: frozenset[str]) -> Recipe:
    """Only this unit in low precision and everything else in FP32; `names` are all nodes of the graph."""
    chosen = {*unit.nodes, *unit.with_nodes}
    if unit.quantized:
        return replace(
            recipe, base="fp32", int8=recipe.int8 & chosen, fp8=recipe.fp8 & chosen, fp32=frozenset()
        )
    return replace(recipe, int8=frozenset(), fp8=frozenset(), fp32=names - chosen)
