"""Builds one precision after the other and lets the gate judge each: as a GPU computes it, and as served here.

The first judgement emulates the rounding of FP16 and BF16, which ONNX Runtime hides on a CPU; the
second runs the file as the service will run it. A variant that fails the first is refused; one that
fails only the second stays in the package for other runtimes, with the failure written beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from vernier.builder.evaluate import Evaluator, concatenated
from vernier.builder.graphs.store import write_model
from vernier.builder.lowering.lower import Recipe
from vernier.builder.lowering.tf32 import emulate_tf32
from vernier.builder.progress import Progress
from vernier.builder.request import QUANTIZED, BuildRequest
from vernier.builder.samples.data import Samples, Subset, first_and_rest, positions, split_apart
from vernier.builder.samples.survey import independent
from vernier.builder.searching.caution import CautiousJudge
from vernier.builder.searching.gate import gate_with, make_judge, resolve_budget
from vernier.builder.searching.search import SearchResult, search
from vernier.builder.variants import VariantBuilder
from vernier.engine.ort import RUNTIME
from vernier.errors import BuildError
from vernier.package.manifest import GateResult
from vernier.package.plans import BELOW_10
from vernier.tensors import Arrays

#: The key in `VariantEntry.gates` for the judgement that emulates a GPU's rounding.
EMULATED = "emulated"
#: Nobody asks for these to serve them from a CPU.
GPU_ONLY = ("tf32", "bf16", "fp8")
#: A variant that uses up less of its budget is taken as it is.
_AMPLE = 0.5
#: A runtime that uses up so many times what a GPU does computes something else than what the search accepted.
_FARTHER = 1.1
#: When FP32 takes no longer for all samples, two searches are affordable.
_CHEAP_SECONDS = 5.0
#: Without this many samples of its own a search selects and verifies on the same ones.
_LEAST_TO_SPLIT = 64
#: So many samples show whether a variant is far off.
_GLIMPSE = 16


@dataclass(frozen=True)
class VariantCandidate:
    """One precision, built and judged.

    status: `pass`, `refused`, `skipped` or `failed`.
    fault: the traceback of a fault in Vernier.
    files: in the staging folder, the ONNX file first; empty unless it is kept.
    gates: by runtime, and `emulated`.
    outputs: its answers to the evaluation samples, as served here, or emulated where it cannot run here.
    """

    precision: str
    status: str
    reason: str = ""
    recipe: Recipe | None = None
    files: tuple[str, ...] = ()
    lowerings: tuple[str, ...] = ()
    gates: dict[str, GateResult] | None = None
    outputs: Arrays | None = None
    found: SearchResult | None = None
    fault: str = ""

    @property
    def gate(self) -> GateResult:
        """The judgement as a GPU computes it."""
        assert self.gates is not None
        return self.gates[EMULATED]

    @property
    def standing(self) -> str:
        """`status`, or `emulated`: in the package, and only an emulation of a GPU says that it is inside the budget."""
        return "emulated" if self.kept and not self.runs_here else self.status

    @property
    def kept(self) -> bool:
        return bool(self.files)

    @property
    def runs_here(self) -> bool:
        return self.kept and self.gates is not None and RUNTIME in self.gates and self.gates[RUNTIME].passed


class VariantEvaluator:
    """The evaluation samples, FP32's answers to them, and the budget that variants are held against.

    seconds: how long FP32 took for all samples.
    """

    def __init__(
        self, builder: VariantBuilder, samples: Samples, request: BuildRequest, progress: Progress
    ) -> None:
        self.builder = builder
        self.samples = samples
        self._request = request
        self._progress = progress
        self.fp32_files: tuple[str, ...] = ()
        self._sensitivities: dict[tuple[bool, tuple[float, ...]], dict[str, float]] = {}
        self._kept: dict[tuple[bool, tuple[float, ...]], frozenset[str]] = {}
        began = perf_counter()
        with progress.task("running FP32", len(samples)) as advance:
            self.reference = Evaluator(builder.prepared.model).run(samples, advance=advance)
        self.seconds = perf_counter() - began
        self.budget = resolve_budget(request.budget, self.reference, samples.labels, request.strict)
        self.judge = make_judge(self.budget, self.reference, samples.labels)
        self._cautious = CautiousJudge(self.judge, groups=samples.groups)

    def build(self, precision: str, folder: Path) -> VariantCandidate:
        """Makes, judges and, if it passes, writes `<precision>.onnx` into `folder`. Raises BuildError."""
        if precision == "tf32":
            return self._tf32()
        recipe = self.builder.recipe(precision)
        improves = precision != "fp32" and self._request.search
        candidate = self._improved(precision, recipe) if improves else self._candidate(precision, recipe)
        gate = candidate.gate
        if not gate.passed:
            return replace(candidate, status="refused", reason=gate.reason)
        return self._serve(self._write(replace(candidate, status="pass"), folder), folder)

    def _candidate(
        self, precision: str, recipe: Recipe, known: Sequence[tuple[Samples, Arrays]] = ()
    ) -> VariantCandidate:
        """known: disjoint parts of the samples, and the recipe's answers to them, which are not run again."""
        # FP32 is what everything is compared with: there is nothing to run again.
        outputs = self.reference if precision == "fp32" else self._emulated(recipe, known)
        gate = gate_with(self.judge, outputs)
        return VariantCandidate(precision, "", "", recipe, gates={EMULATED: gate}, outputs=outputs)

    def _used(self, candidate: VariantCandidate) -> float:
        """The part of the budget that is used up; above 1 it is missed, or may be on the next samples."""
        return self._used_by(candidate.outputs or {})

    def _used_by(self, outputs: Arrays) -> float:
        return self._cautious.used(outputs)

    @property
    def _doubt(self) -> str:
        count = independent(self.samples)
        groups = "" if count == len(self.samples) else f" ({count} of them independent)"
        return (
            f"it passes on these {len(self.samples)} samples{groups}, but so few cannot show that it will on the next: "
            f"evaluate on more, or take the budget at its word with --no-search"
        )

    def _improved(self, precision: str, wished: Recipe) -> VariantCandidate:
        """The recipe as it is when it is well inside the budget, or brought into it: with ranges that hardly
        clip, by giving nodes back, or both.

        Of two that are inside already the one with more to spare is taken: what clips rarely may not
        have clipped in these samples.
        """
        tried: list[tuple[float, Recipe, VariantCandidate | None]] = []
        for recipe in (wished, self.builder.reaching(wished)) if wished.ranges else (wished,):
            used = self._glimpsed(recipe) if precision in QUANTIZED else 0.0
            candidate = self._candidate(precision, recipe) if used <= 1 else None
            if candidate is not None:
                used = self._used(candidate)
                if recipe is wished and used <= _AMPLE:
                    return candidate
            tried.append((used, recipe, candidate))
        tried.sort(key=lambda entry: entry[0])
        used, _, best = tried[0]
        if used <= 1 and best is not None:
            return best
        # Which ranges leave more nodes quantized only a search of both can tell.
        if self.seconds > _CHEAP_SECONDS:
            del tried[1:]
        found = [self._searched(precision, recipe, candidate) for _, recipe, candidate in tried]
        return max(found, key=lambda c: (c.gate.passed, c.found.kept_macs if c.found else 0.0))

    def _glimpsed(self, recipe: Recipe) -> float:
        """What the worst of a few samples uses up, where to run them all takes its time; above 1 more would, too."""
        if self.seconds <= _CHEAP_SECONDS:
            return 0.0
        few, _ = first_and_rest(self.samples, _GLIMPSE)
        return self._cautious.worst_of_some(Evaluator(self.builder.graph(recipe)).run(few))

    def _searched(
        self, precision: str, recipe: Recipe, candidate: VariantCandidate | None
    ) -> VariantCandidate:
        """The recipe with as many nodes given back as the budget demands.

        candidate: the recipe as it is, None if that was not judged on all samples.
        """
        found = self._search(recipe)
        if precision in QUANTIZED and not (found.recipe.int8 or found.recipe.fp8):
            candidate = candidate or self._candidate(precision, recipe)
            missed = candidate.gate.reason or self._doubt
            reason = f"no node can stay quantized inside the budget; with all of them {missed}{_rest(found)}"
            return replace(_refused(candidate, EMULATED, reason), found=found)
        candidate = self._candidate(precision, found.recipe, found.verified)
        return replace(candidate, found=replace(found, verified=()))

    def _tf32(self) -> VariantCandidate:
        """The FP32 graph, which the builder of a plan is allowed to run with TF32; a CPU cannot."""
        outputs = Evaluator(emulate_tf32(self.builder.prepared.model), as_on_gpu=False).run(self.samples)
        gate = gate_with(self.judge, outputs)
        if gate.passed and self._request.search and self._used_by(outputs) > 1:
            gate = gate.model_copy(update={"passed": False, "reason": self._doubt})
        nowhere = gate.model_copy(update={"passed": False, "reason": "a CPU has no TF32"})
        return VariantCandidate(
            "tf32",
            "pass" if gate.passed else "refused",
            "kept for GPUs; a CPU has no TF32" if gate.passed else gate.reason,
            self.builder.recipe("tf32"),
            self.fp32_files if gate.passed else (),
            gates={EMULATED: gate, RUNTIME: nowhere},
            outputs=outputs,
        )

    def limits(self, precision: str) -> dict[str, float]:
        """How far golden vectors and live answers may stray; FP32 has the self-test's own limits."""
        return {} if precision == "fp32" else self.budget.limits()

    def failed_here(self, candidate: VariantCandidate, reason: str) -> VariantCandidate:
        """A variant whose executor fails its self-test stays for other runtimes alone."""
        if candidate.precision == "fp32":
            raise BuildError(
                f"FP32 fails its own self-test, {reason}: the model's answers are not reproducible"
            )
        refused = _refused(candidate, RUNTIME, reason)
        return replace(refused, status="refused", reason=f"kept for GPUs, as which it passes; {reason}")

    def _emulated(self, recipe: Recipe, known: Sequence[tuple[Samples, Arrays]] = ()) -> Arrays:
        done = [positions(samples, self.samples) for samples, _ in known]
        left = np.setdiff1d(np.arange(len(self.samples)), np.concatenate([[], *done]))
        parts = [answers for _, answers in known]
        with self._progress.task("running the variant", len(self.samples)) as advance:
            advance(len(self.samples) - len(left))
            if len(left):
                samples = Subset(self.samples, left) if known else self.samples
                parts.append(Evaluator(self.builder.graph(recipe)).run(samples, advance=advance))
        order = np.argsort(np.concatenate([*done, left]))
        return {name: array[order] for name, array in concatenated(parts).items()}

    def _search(self, recipe: Recipe) -> SearchResult:
        if len(self.samples) >= _LEAST_TO_SPLIT:
            select, verify = split_apart(self.samples, len(self.samples) // 2)
        else:
            select = verify = self.samples
        # Nodes are ranked one by one in FP32 surroundings, so INT8 variants of both bases share a ranking.
        key = (bool(recipe.fp8), tuple(recipe.ranges.values()))
        known = self._sensitivities.setdefault(key, {})
        found = search(
            self.builder.prepared,
            recipe,
            self.builder.nodes,
            select,
            verify,
            self.budget,
            self._progress,
            known,
            (self.samples, self.reference),
            self._kept.get(key, frozenset()),
        )
        if recipe.int8 or recipe.fp8:
            known |= found.sensitivities
        if found.passed:
            self._kept[key] = found.recipe.int8 | found.recipe.fp8
        return found

    def _write(self, candidate: VariantCandidate, folder: Path) -> VariantCandidate:
        recipe = candidate.recipe
        assert recipe is not None
        files = write_model(self.builder.graph(recipe), folder / f"{candidate.precision}.onnx")
        lowerings: list[Path] = []
        if self._request.below_tensorrt_10 and candidate.precision in ("fp16", "int8-fp32", "int8"):
            lowerings = write_model(
                self.builder.graph(recipe, "trt8"), folder / f"{candidate.precision}.trt8.onnx"
            )
        if candidate.precision == "fp32":
            self.fp32_files = tuple(p.name for p in files)
        return replace(
            candidate, files=tuple(p.name for p in files), lowerings=tuple(p.name for p in lowerings)
        )

    def _serve(self, candidate: VariantCandidate, folder: Path) -> VariantCandidate:
        """Judges the file as ONNX Runtime serves it; where that strays farther than a GPU, the doubt counts again."""
        assert candidate.outputs is not None
        beside = candidate.outputs
        try:
            outputs = Evaluator(folder / candidate.files[0], as_on_gpu=False, optimize=True).run(self.samples)
        except BuildError as error:
            if candidate.precision == "fp32":
                raise
            return replace(candidate, reason=f"kept for GPUs; {RUNTIME} cannot run it: {error.message}")
        gate = gate_with(self.judge, outputs, RUNTIME)
        judged = gate.passed and candidate.precision != "fp32" and self._request.search
        if judged and self._used_by(outputs) > max(1.0, _FARTHER * self._used_by(beside)):
            gate = gate.model_copy(update={"passed": False, "reason": f"on {RUNTIME}: {self._doubt}"})
        gates = {**(candidate.gates or {}), RUNTIME: gate}
        if gate.passed:
            return replace(candidate, gates=gates, outputs=outputs)
        reason = f"kept for GPUs, as which it passes; {gate.reason}"
        status = "pass" if candidate.precision in GPU_ONLY else "refused"
        return replace(candidate, status=status, reason=reason, gates=gates, outputs=outputs)


def _refused(candidate: VariantCandidate, runtime: str, reason: str) -> VariantCandidate:
    gates = dict(candidate.gates or {})
    gates[runtime] = gates[runtime].model_copy(update={"passed": False, "reason": reason})
    return replace(candidate, gates=gates)


def _rest(found: SearchResult) -> str:
    """What the narrow type around the quantized nodes uses up without any of them, in words."""
    if found.recipe.base == "fp32":
        return ""
    given = len(found.given_back)
    used = next((s.used for s in found.evaluations if (s.samples, s.given_back) == ("verify", given)), 0.0)
    return f"; without any, {found.recipe.base.upper()} and the doubt use up {used:.0%} of it" if used else ""


def lowerings_of(candidate: VariantCandidate) -> dict[str, list[str]]:
    return {BELOW_10: list(candidate.lowerings)} if candidate.lowerings else {}


def safest_first(precisions: Sequence[str], order: Sequence[str]) -> list[str]:
    return sorted(precisions, key=order.index)
