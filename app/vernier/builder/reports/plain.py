"""What plain INT8 would have come to: every node, scales from the largest magnitude, weights rounded to nearest.

It is what quantizers do by default, so it tells what calibration, rounding and search have bought.
"""

from __future__ import annotations

from collections.abc import Sequence

from vernier.builder.evaluate import Evaluator
from vernier.builder.lowering.lower import Recipe
from vernier.builder.lowering.quantized import INT8_MAX
from vernier.builder.progress import Progress
from vernier.builder.quantizing.weights import quantize_weights
from vernier.builder.reports.report import PlainReport
from vernier.builder.searching.candidates import VariantCandidate, VariantEvaluator
from vernier.builder.searching.gate import gate_with
from vernier.builder.variants import VariantBuilder
from vernier.errors import BuildError

#: It is a comparison and no result, so a model that takes longer for all samples goes without.
_MOST_SECONDS = 10.0


def plain_int8(
    builder: VariantBuilder,
    evaluator: VariantEvaluator,
    candidates: Sequence[VariantCandidate],
    progress: Progress,
) -> PlainReport | None:
    """Plain INT8 in the surroundings of the INT8 variant that was built; None without one, or where it takes long."""
    built = next((c.recipe for c in candidates if c.precision in ("int8", "int8-fp32") and c.recipe), None)
    if built is None or evaluator.seconds > _MOST_SECONDS:
        return None
    nodes, found = builder.nodes, builder.ranges
    scales = {name: found.peaks.get(name, 0.0) / INT8_MAX or scale for name, scale in found.scales.items()}
    with progress.task("evaluator plain INT8 for comparison"):
        try:
            recipe = Recipe(
                base=built.base,
                int8=frozenset(node.name for node in nodes),
                fp32=frozenset(builder.hazards(built.base)),
                ranges=scales,
                weights=quantize_weights(builder.prepared.model, nodes, None, "nearest"),
            )
            outputs = Evaluator(builder.graph(recipe)).run(evaluator.samples)
            verdict, gate = evaluator.judge.judge(outputs), gate_with(evaluator.judge, outputs)
        except BuildError:  # such as a graph that ONNX Runtime refuses
            return None
    worst = max(verdict.findings, key=lambda finding: finding.used)
    return PlainReport(verdict.used, gate.passed, worst.term.text, worst.value, len(nodes))
