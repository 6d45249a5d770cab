"""Gathers from a build what its report tells: standings, layers, worst samples, ranges, and the decision in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vernier.accuracy import Comparison
from vernier.budget import Finding, Judge
from vernier.builder.progress import Progress
from vernier.builder.reports.plain import plain_int8
from vernier.builder.reports.report import (
    BuildReport,
    LayerReport,
    RangeReport,
    SampleReport,
    SearchReport,
    StepReport,
    TermReport,
    VariantReport,
    WarningReport,
)
from vernier.builder.request import QUANTIZED
from vernier.builder.samples.data import Subset
from vernier.builder.samples.survey import independent
from vernier.builder.searching.auto import Standing, explain
from vernier.builder.searching.candidates import EMULATED, VariantCandidate, VariantEvaluator
from vernier.builder.searching.gate import worst_samples
from vernier.builder.searching.latency import Latencies, relative_time
from vernier.builder.searching.ranking import Ranker, time_per_sample
from vernier.builder.searching.units import kept_macs, quantized_units
from vernier.builder.variants import VariantBuilder
from vernier.engine.ort import RUNTIME
from vernier.errors import BuildError
from vernier.package.manifest import EvidenceWarning, GateResult

#: Layers are ranked for the report alone when that takes no longer.
_RANKING_SECONDS = 15.0
_WORST_SAMPLES, _MOST_VALUES = 4, 8


def gather(
    name: str,
    builder: VariantBuilder,
    evaluator: VariantEvaluator,
    candidates: Sequence[VariantCandidate],
    latencies: Latencies,
    chosen: str,
    not_built: Mapping[str, str],
    folder: Path,
    notes: Sequence[str],
    facts: Mapping[str, str],
    progress: Progress,
    warnings: Sequence[EvidenceWarning] = (),
) -> BuildReport:
    """The report of a build whose variants lie in `folder`.

    Args:
        chosen: the precision that the runtime at hand serves.
        not_built: precisions that were not tried, and why.
    """
    standings = [
        Standing(c.precision, c.standing, latencies.median.get(c.precision, {}), c.reason) for c in candidates
    ]
    standings += [Standing(precision, "skipped", {}, reason) for precision, reason in not_built.items()]
    why = explain(chosen, standings, RUNTIME)
    variants = [_variant(c, builder, evaluator, latencies, why[c.precision], folder) for c in candidates]
    variants += [VariantReport(precision, "skipped", why[precision]) for precision in not_built]
    reduced = [c for c in candidates if c.precision not in ("fp32", "tf32")]
    return BuildReport(
        name=name,
        runtime=RUNTIME,
        chosen=chosen,
        budget=tuple(evaluator.budget.texts),
        evaluated=len(evaluator.samples),
        independent=independent(evaluator.samples),
        plain=plain_int8(builder, evaluator, candidates, progress),
        warnings=tuple(WarningReport(warning.code, warning.message) for warning in warnings),
        decision=_decision(chosen, variants),
        variants=tuple(variants),
        layers=_layers(builder, evaluator, reduced, progress),
        samples={c.precision: _worst(evaluator, c) for c in reduced if c.outputs},
        searches={c.precision: _search(c) for c in reduced if c.found},
        ranges=_ranges(builder, reduced),
        notes=tuple(notes),
        facts=dict(facts),
    )


# --- variants -------------------------------------------------------------------------------------
def _variant(
    candidate: VariantCandidate,
    builder: VariantBuilder,
    evaluator: VariantEvaluator,
    latencies: Latencies,
    why: str,
    folder: Path,
) -> VariantReport:
    gates = candidate.gates or {}
    emulated, served = gates.get(EMULATED), gates.get(RUNTIME)
    measured = served or emulated
    recipe = candidate.recipe
    quantized = candidate.precision in QUANTIZED and recipe is not None
    return VariantReport(
        precision=candidate.precision,
        status=candidate.standing,
        explanation=why,
        bytes=sum((folder / name).stat().st_size for name in candidate.files),
        terms=_terms(evaluator.judge, emulated),
        served=_terms(evaluator.judge, served) if candidate.runs_here else (),
        latency_ms=latencies.median.get(candidate.precision, {}),
        spread_ms=latencies.spread(candidate.precision),
        metrics=dict(measured.metrics) if measured else {},
        assignment=builder.assignment(recipe) if recipe is not None else {},
        kept_macs=kept_macs(builder.nodes, recipe) if quantized and recipe is not None else None,
    )


def _terms(judge: Judge, gate: GateResult | None) -> tuple[TermReport, ...]:
    if gate is None:
        return ()
    # A value that is not in the gate's record was not finite.
    found = [judge.assess(term, gate.metrics.get(term.key, math.nan)) for term in judge.budget.terms]
    return tuple(_term(finding) for finding in found)


def _term(finding: Finding) -> TermReport:
    return TermReport(
        finding.term.text, finding.value, finding.limit, finding.used, finding.passed, finding.reference
    )


def _decision(chosen: str, variants: Sequence[VariantReport]) -> tuple[str, ...]:
    by_name = {variant.precision: variant for variant in variants}
    winner, exact = by_name[chosen], by_name["fp32"]
    sentences = []
    if winner is exact:
        sentences.append(f"{RUNTIME} serves fp32: no variant inside the budget is faster here.")
    else:
        faster = relative_time(exact.latency_ms, winner.latency_ms)
        size = f", at {winner.bytes / exact.bytes:.0%} of its size" if winner.bytes and exact.bytes else ""
        sentences.append(f"{RUNTIME} serves {chosen}: {faster:.2f} times as fast as FP32{size}.")
        tight = max((*winner.terms, *winner.served), key=lambda term: term.used)
        beside = "" if tight.reference is None else f" against FP32's {tight.reference:.5g}"
        sentences.append(
            f"Its tightest term is {tight.text}: the value is {tight.value:.5g}{beside}, "
            f"which uses up {tight.used:.0%} of what the budget allows."
        )
    refused = [v.precision for v in variants if v.status == "refused" and not v.bytes]
    if refused:
        sentences.append(f"The gate refused {', '.join(refused)}; the package does not hold it.")
    emulated = [v.precision for v in variants if v.status == "emulated"]
    if emulated:
        sentences.append(
            f"In the package for GPUs, whose rounding was emulated; no GPU has run it yet: {', '.join(emulated)}."
        )
    return tuple(sentences)


# --- layers ---------------------------------------------------------------------------------------
def _layers(
    builder: VariantBuilder,
    evaluator: VariantEvaluator,
    candidates: Sequence[VariantCandidate],
    progress: Progress,
) -> dict[str, list[LayerReport]]:
    found: dict[str, list[LayerReport]] = {}
    ranked: dict[str, dict[str, float]] = {}
    for candidate in candidates:
        recipe = candidate.recipe
        if recipe is None or candidate.precision not in QUANTIZED:
            continue
        kind = "fp8" if candidate.precision == "fp8" else "int8"
        if candidate.found and candidate.found.sensitivities:
            ranked[kind] = candidate.found.sensitivities
        if kind not in ranked:
            ranked[kind] = _sensitivities(builder, evaluator, candidate.precision, progress)
        macs = sum(node.macs for node in builder.nodes) or 1
        found[candidate.precision] = [
            LayerReport(
                name=node.name,
                op_type=node.op_type,
                precision=builder.type_of(node.name, recipe),
                macs=node.macs / macs,
                sensitivity=ranked[kind].get(node.name),
                rounding=recipe.weights[node.name].method if node.name in recipe.weights else "",
            )
            for node in builder.nodes
        ]
    return found


def _sensitivities(
    builder: VariantBuilder, evaluator: VariantEvaluator, precision: str, progress: Progress
) -> dict[str, float]:
    """Of every node alone, where that is quickly had; otherwise nothing."""
    model, wished = builder.prepared.model, builder.recipe(precision)
    try:
        each = time_per_sample(model, evaluator.samples)
        ranker = Ranker(model, wished, evaluator.budget, evaluator.samples, each, _RANKING_SECONDS)
        units = quantized_units(model, builder.nodes, wished)
        if ranker.seconds_for(units) <= _RANKING_SECONDS:
            ranker.rank(units, progress)
        return ranker.quantized
    except BuildError:
        return {}


# --- samples, search, ranges ----------------------------------------------------------------------
def _worst(evaluator: VariantEvaluator, candidate: VariantCandidate) -> list[SampleReport]:
    outputs, reference, labels = candidate.outputs or {}, evaluator.reference, evaluator.samples.labels
    rows = (
        evaluator.samples.indices if isinstance(evaluator.samples, Subset) else range(len(evaluator.samples))
    )
    found = []
    moved = {
        name: Comparison(array, outputs[name]).per_sample("rel_spread") for name, array in reference.items()
    }
    for index in worst_samples(reference, outputs, _WORST_SAMPLES):
        values = {}
        for name, array in reference.items():
            exact, other = (a[index].reshape(-1).astype(np.float64) for a in (array, outputs[name]))
            with np.errstate(invalid="ignore"):
                distance = np.nan_to_num(np.abs(other - exact), nan=np.inf)
            chosen = np.sort(np.argsort(-distance, kind="stable")[:_MOST_VALUES])
            values[name] = [
                (_place(int(i), array.shape[1:]), float(exact[i]), float(other[i])) for i in chosen
            ]
        label = labels[index] if labels is not None else None
        found.append(
            SampleReport(
                index=int(rows[index]),
                moved=max(float(per_sample[index]) for per_sample in moved.values()),
                values=values,
                label="" if label is None or np.size(label) > 1 else str(np.ravel(label)[0]),
            )
        )
    return found


def _place(flat: int, shape: tuple[int, ...]) -> int | tuple[int, ...]:
    """Where a value of one sample stands, in the output's own dimensions."""
    return flat if len(shape) < 2 else tuple(int(i) for i in np.unravel_index(flat, shape))


def _search(candidate: VariantCandidate) -> SearchReport:
    assert candidate.found is not None
    result = candidate.found
    steps = tuple(StepReport(step.given_back, step.used, step.samples) for step in result.evaluations)
    return SearchReport(steps, result.given_back, result.seconds)


def _ranges(builder: VariantBuilder, candidates: Sequence[VariantCandidate]) -> tuple[RangeReport, ...]:
    if not any(c.precision in QUANTIZED and c.recipe for c in candidates):
        return ()
    ranges = builder.ranges
    return tuple(
        RangeReport(name, ranges.peaks.get(name, 0.0), scale * 127, ranges.per_tensor_method.get(name, ""))
        for name, scale in ranges.scales.items()
    )
