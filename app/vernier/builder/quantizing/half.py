"""Finds the nodes that must stay FP32 in an FP16 or BF16 graph, by running data through the model.

A list of operator names would both keep too much in FP32 and miss what matters: whether a layer
overflows depends on its weights and on the data.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto

from vernier.builder.graphs.graph import GraphView
from vernier.builder.nodes.floats import FP16_MAX
from vernier.builder.nodes.placement import CONVOLUTIONS, quantizable_nodes, weight_axis
from vernier.builder.progress import NoProgress, Progress
from vernier.builder.quantizing.taps import IntermediateOutputs
from vernier.builder.quantizing.watch import ObservedRange, RangeObserver
from vernier.builder.samples.data import Samples, limit
from vernier.tensors import Array

#: A quarter of FP16's largest number: data not seen yet may be larger than what was.
FP16_LIMIT = FP16_MAX / 4
#: Below it FP16 has fewer and fewer bits.
FP16_SMALLEST_NORMAL = 2.0**-14

#: Rare samples are the ones that overflow, so as many are run as take this many operations.
_MIN_SAMPLES, _MAX_SAMPLES, _MACS = 128, 8192, 5e11
#: A weight whose rounding to FP16 changes it by more than this share of its norm is too small for it …
_WEIGHT_LOSS = 2.0**-8
#: … and so is a single channel, unless all it can add to its output is below this share of its bias.
_CHANNEL_LOSS, _CHANNEL_SHARE = 2.0**-6, 2.0**-12


def half_hazards(
    model: ModelProto,
    samples: Samples,
    base: str = "fp16",
    limit_at: float = FP16_LIMIT,
    progress: Progress | None = None,
) -> dict[str, str]:
    """`hazards_of` what a run of data shows: as many samples as are run in reasonable time.

    Raises:
        BuildError: the model fails on the samples.
    """
    observer = RangeObserver(model)
    seen = observer.nothing_yet()
    if observer.names:
        intermediate = IntermediateOutputs(model, observer.names)
        macs = max(1, sum(node.macs for node in quantizable_nodes(model)))
        chosen = limit(samples, int(np.clip(_MACS / macs, _MIN_SAMPLES, _MAX_SAMPLES)))
        with (progress or NoProgress()).task("looking for overflow", total=len(chosen)) as advance:
            for found, count in intermediate.digests(
                chosen, intermediate.rows(chosen), lambda v, *_: observer.observe(v)
            ):
                seen = observer.merge(seen, found)
                advance(count)
    return hazards_of(model, observer, seen, base, limit_at)


def hazards_of(
    model: ModelProto, observer: RangeObserver, looks: Array, base: str = "fp16", limit_at: float = FP16_LIMIT
) -> dict[str, str]:
    """Node name → why it must stay FP32 in a graph of type `base` (`fp16` or `bf16`).

    In FP16: an input, output or constant beyond `limit_at`; values or weights so small that FP16 loses
    them; a divisor or logarithm that FP16 would turn into zero. In both: whole numbers (ids, positions,
    lengths) that are not exact any more.

    Args:
        looks: what `observer` has seen of the model's values.

    """
    view = GraphView(model)
    seen = observer.ranges(looks)
    values_at_risk = {
        n: r for n, s in seen.items() if (r := _risk(s, n in observer.divisors, base, limit_at))
    }
    found: dict[str, str] = {}
    for node in view.nodes:
        reason = _of_values(node, values_at_risk)
        if base == "fp16" and not reason:
            reason = _inside(view, node, seen, limit_at) or _of_constants(view, node, seen, limit_at)
        if reason:
            found[node.name] = reason
    return found


def _risk(seen: ObservedRange, divides: bool, base: str, limit_at: float) -> str:
    if base in seen.inexact:
        return f"whole numbers up to {seen.peak:.0f} are not exact"
    if base != "fp16":
        return ""
    if seen.peak > limit_at:
        return f"values reach {seen.peak:.3g}"
    if 0.0 < seen.peak < FP16_SMALLEST_NORMAL:
        return f"no value is larger than {seen.peak:.3g}"
    if divides and seen.least < FP16_SMALLEST_NORMAL:
        return f"divisors or logarithms of values down to {seen.least:.3g}"
    return ""


def _of_values(node: NodeProto, at_risk: dict[str, str]) -> str:
    for name in (*node.input, *node.output):
        if name in at_risk:
            return f"'{name}': {at_risk[name]}"
    return ""


def _inside(view: GraphView, node: NodeProto, seen: dict[str, ObservedRange], limit_at: float) -> str:
    """Operators whose intermediate results are larger than what goes in and comes out."""
    if not node.input or node.input[0] not in seen or not node.output or node.output[0] not in seen:
        return ""
    into, out = seen[node.input[0]], seen[node.output[0]]
    inner = 0.0
    if node.op_type == "ReduceMean" and out.size:
        inner = out.peak * into.size / out.size
    elif node.op_type in ("ReduceL2", "LpNormalization"):
        inner = (out.peak if node.op_type == "ReduceL2" else into.peak) ** 2
    elif node.op_type == "ReduceLogSumExp":
        inner = float(np.exp(min(into.peak, 80.0)))
    return f"intermediate sums reach {inner:.3g}" if inner > limit_at else ""


def _of_constants(view: GraphView, node: NodeProto, seen: dict[str, ObservedRange], limit_at: float) -> str:
    for position, name in enumerate(node.input):
        if name not in view.constants or not view.is_float(name):
            continue
        value = view.constant(name)
        if value is None or not value.size:
            continue
        peak = float(np.abs(value[np.isfinite(value)]).max(initial=0.0))
        if peak > limit_at:
            return f"constant '{name}' holds {peak:.3g}"
        if value.size > 1 and (reason := _too_small(view, node, position, value, seen)):
            return reason
    return ""


def _too_small(
    view: GraphView, node: NodeProto, position: int, value: Array, seen: dict[str, ObservedRange]
) -> str:
    lost = value.astype(np.float16).astype(np.float32) - value
    norm = float(np.linalg.norm(value))
    if norm and float(np.linalg.norm(lost)) > _WEIGHT_LOSS * norm:
        return f"constant '{node.input[position]}' is too small for FP16"
    axis = weight_axis(view, node) if node.op_type in (*CONVOLUTIONS, "Gemm", "MatMul") else None
    if axis is None or position != 1:
        return ""
    others = tuple(i for i in range(value.ndim) if i != axis)
    norms = np.sqrt(np.square(value, dtype=np.float64).sum(axis=others))
    losses = np.sqrt(np.square(lost, dtype=np.float64).sum(axis=others))
    hurt = losses > _CHANNEL_LOSS * norms
    if not hurt.any():
        return ""
    bias_name = node.input[2] if len(node.input) > 2 else ""
    bias = view.constant(bias_name) if bias_name in view.constants else None
    if bias is not None and bias.size == norms.size:
        into = seen[node.input[0]].peak if node.input[0] in seen else np.inf
        reach = into * np.abs(value).sum(axis=others, dtype=np.float64)
        hurt &= reach > _CHANNEL_SHARE * np.abs(bias.reshape(-1))
    if not hurt.any():
        return ""
    return f"{int(hurt.sum())} channels of '{node.input[1]}' are too small for FP16"


def hazard_notes(hazards: dict[str, str], base: str, most: int = 3) -> tuple[str, ...]:
    """One sentence for the report, or none."""
    if not hazards:
        return ()
    shown = "; ".join(f"{name} ({why})" for name, why in list(hazards.items())[:most])
    more = f"; and {len(hazards) - most} more" if len(hazards) > most else ""
    return (
        f"{len(hazards)} nodes stay FP32 because {base.upper()} cannot hold what they compute: {shown}{more}",
    )
