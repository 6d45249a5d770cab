"""Builds one exhibit as a user would and judges the result on data that the build never saw."""

from __future__ import annotations

import contextlib
import json
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

import onnx

from benchmarks.precision.exhibit import Exhibit
from vernier.accuracy import Comparison
from vernier.budget import Budget, Judge, parse_term
from vernier.builder.evaluate import run_model
from vernier.builder.graphs.prepare import PreparedModel, prepare
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.nodes.placement import quantizable_nodes
from vernier.builder.pipeline import build
from vernier.builder.plans.plan import PlanOptions
from vernier.builder.progress import Advance, NoProgress
from vernier.builder.quantizing.calibrate import calibrate
from vernier.builder.quantizing.weights import quantize_weights
from vernier.builder.request import BuildOutcome, BuildRequest
from vernier.builder.samples.data import Samples, load_samples
from vernier.builder.searching.gate import make_judge
from vernier.engine.ort import RUNTIME
from vernier.tensors import Arrays


class Phases(NoProgress):
    """Seconds of each outermost step of a build, by title; what no step covers is left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._depth = 0

    @contextlib.contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Advance]:
        began = perf_counter()
        self._depth += 1
        try:
            with super().task(title, total) as advance:
                yield advance
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds[title] = self.seconds.get(title, 0.0) + perf_counter() - began


EMULATED, BASELINE = "as a GPU computes it", "min-max everything"


@dataclass(frozen=True)
class Judged:
    """One variant on held-out data.

    how: `as a GPU computes it` or the runtime that served it.
    metric: the task metric as written in the budget; value and reference in its own unit.
    inside: whether every term of the budget held, the bounds on single answers included.
    worst: the largest `rel_spread` of a sample.
    """

    precision: str
    how: str
    metric: str
    value: float
    reference: float
    inside: bool
    worst: float
    reason: str


@dataclass(frozen=True)
class Row:
    """One build.

    judged: every published variant, and `min-max everything` for comparison.
    int8_nodes, weighted_nodes, kept_macs: of the `int8` variant.
    phases: seconds of the build's steps.
    plans: how many variants TensorRT for RTX parsed and built, without a GPU.
    """

    name: str
    title: str
    strict: bool
    budget: tuple[str, ...]
    evaluated: int
    held_out: int
    chosen: str
    statuses: dict[str, str]
    judged: tuple[Judged, ...]
    int8_nodes: int
    weighted_nodes: int
    kept_macs: float
    bytes_fp32: int
    bytes_int8: int
    plans: int
    search_seconds: float
    build_seconds: float
    peak_mb: float
    phases: dict[str, float] = field(default_factory=dict)


def measure(
    exhibit: Exhibit, strict: bool, precisions: tuple[str, ...] = ("auto",), plans: bool = True
) -> Row:
    """A build on calibration and evaluation data, judged on the held-out data.

    Args:
        plans: also build every variant with TensorRT for RTX, which needs no GPU; `auto` then tries what
            GPUs run.
    """
    with tempfile.TemporaryDirectory(prefix="vernier-bench-") as scratch:
        folder = Path(scratch)
        request = BuildRequest(
            model=exhibit.model,
            name="exhibit",
            out=folder / "engines",
            precisions=precisions,
            calibration=str(exhibit.calibration),
            evaluation=str(exhibit.evaluation),
            strict=strict,
            plans=PlanOptions("tensorrt-rtx", compute_capabilities=("8.9",)) if plans else None,
        )
        began = perf_counter()
        phases = Phases()
        outcome = build(request, phases)
        seconds = perf_counter() - began
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        prepared = prepare(exhibit.model, {}, folder)
        held_out = load_samples(str(exhibit.heldout), prepared.inputs)
        return _row(exhibit, strict, outcome, prepared, held_out, seconds, peak_mb, phases.seconds)


def _row(
    exhibit: Exhibit,
    strict: bool,
    outcome: BuildOutcome,
    prepared: PreparedModel,
    held_out: Samples,
    seconds: float,
    peak_mb: float,
    phases: dict[str, float],
) -> Row:
    manifest = outcome.manifest
    gates = manifest.variants["fp32"].gates
    texts = next(iter(gates.values())).budget
    judge = make_judge(
        Budget(tuple(parse_term(text) for text in texts)),
        run_model(prepared.model, held_out),
        held_out.labels,
    )
    judged = []
    for precision, entry in manifest.variants.items():
        path = outcome.package / entry.files[0]
        # TF32 shares the FP32 file; a plan is built from it, and a CPU has nothing to show.
        if precision not in ("fp32", "tf32"):
            judged.append(_judged(precision, EMULATED, judge, run_model(onnx.load(path), held_out)))
        if RUNTIME in entry.gates and entry.gates[RUNTIME].passed:
            outputs = run_model(path, held_out, as_on_gpu=False, optimize=True)
            judged.append(_judged(precision, RUNTIME, judge, outputs))
    naive = _min_max_everything(prepared, load_samples(str(exhibit.calibration), prepared.inputs))
    judged.append(_judged(BASELINE, EMULATED, judge, run_model(naive, held_out)))
    report = json.loads((outcome.package / "report.json").read_text("utf-8"))
    variants = {variant["precision"]: variant for variant in report["variants"]}
    int8 = variants["int8"]
    kept = int8["assignment"] if int8["bytes"] else {}
    return Row(
        name=exhibit.name,
        title=exhibit.title,
        strict=strict,
        budget=tuple(texts),
        evaluated=next(iter(gates.values())).samples,
        held_out=len(held_out),
        chosen=manifest.decision[RUNTIME],
        statuses={name: variant["status"] for name, variant in variants.items()},
        judged=tuple(judged),
        int8_nodes=kept.get("int8", 0),
        weighted_nodes=sum(int8["assignment"].values()),
        kept_macs=int8["kept_macs"] if kept else 0.0,
        bytes_fp32=variants["fp32"]["bytes"],
        bytes_int8=int8["bytes"],
        plans=len(manifest.plans),
        search_seconds=sum(found["seconds"] for found in report["searches"].values()),
        build_seconds=seconds,
        peak_mb=peak_mb,
        phases=phases,
    )


def _judged(precision: str, how: str, judge: Judge, outputs: Arrays) -> Judged:
    verdict = judge.judge(outputs)
    task = next((f for f in verdict.findings if f.reference is not None), verdict.findings[0])
    worst = max(
        Comparison(array, outputs[name]).value("rel_spread", "max") for name, array in judge.reference.items()
    )
    return Judged(
        precision,
        how,
        task.term.key,
        task.value,
        task.reference or 0.0,
        verdict.passed,
        worst,
        verdict.reason,
    )


def _min_max_everything(prepared: PreparedModel, calibration: Samples) -> onnx.ModelProto:
    """What a converter without a gate makes: every node in INT8, ranges by min-max, weights to the nearest."""
    nodes = quantizable_nodes(prepared.model)
    ranges = calibrate(prepared.model, nodes, calibration, "minmax").scales
    rounded = quantize_weights(prepared.model, nodes, None, "nearest", ranges=ranges)
    names = frozenset(node.name for node in nodes)
    return lower(prepared.model, Recipe("fp32", int8=names, ranges=ranges, weights=rounded))


def as_json(row: Row) -> str:
    return json.dumps(asdict(row), indent=1) + "\n"


def from_json(text: str) -> Row:
    found = json.loads(text)
    found["judged"] = tuple(Judged(**entry) for entry in found["judged"])
    return Row(**found)
