"""The whole build: prepare, calibrate, lower, gate, measure, package, publish.

Nothing is visible before everything is done: the package is put together in a temporary folder that
disappears on every way out but the last one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

from vernier.builder import packaging
from vernier.builder.command import tool_versions
from vernier.builder.graphs.prepare import PreparedModel, prepare
from vernier.builder.graphs.store import input_names
from vernier.builder.plans.plan_package import add_plans
from vernier.builder.progress import Progress
from vernier.builder.reports.evidence import gather
from vernier.builder.reports.report import BuildReport
from vernier.builder.request import (
    AUTO,
    DEFAULT_LABEL_KEY,
    QUANTIZED,
    BuildOutcome,
    BuildRequest,
    VariantOutcome,
    check_calibration_data,
)
from vernier.builder.resume import check_path
from vernier.builder.samples.data import (
    ArraySamples,
    Samples,
    check_samples,
    fixed_batch,
    limit,
    one_request_each,
    open_data,
    split_apart,
    whole_number_notes,
)
from vernier.builder.samples.weigher import EvidenceWeigher
from vernier.builder.searching.attempts import attempt, prove_and_measure
from vernier.builder.searching.auto import worth_building
from vernier.builder.searching.candidates import (
    VariantCandidate,
    VariantEvaluator,
    lowerings_of,
    safest_first,
)
from vernier.builder.searching.latency import Latencies, fastest
from vernier.builder.variants import VariantBuilder
from vernier.engine.ort import RUNTIME
from vernier.errors import BuildError, BuildInterrupted, EngineError, GateRefused
from vernier.package.calibration import CACHE_NAME, SIDECAR_NAME, write_calibration
from vernier.package.integrity import entries_of, staging_folder, temporary_folder
from vernier.package.manifest import (
    PRECISIONS,
    CalibrationEntry,
    FileEntry,
    Manifest,
    PlanEntry,
    VariantEntry,
)

WORK_PREFIX = "vernier-build-"
_EXAMPLE_ROWS = 64
#: Without evaluation data this part of the calibration data is kept back for the gate.
_HELD_BACK = 1 / 3


def build(request: BuildRequest, progress: Progress) -> BuildOutcome:
    """Builds and publishes one package.

    Raises:
        BuildError: bad input, or nothing can be built from it; nothing was published then. A variant
            that the gate refuses, or that cannot be built, is no error: the package is published without it.
        BuildInterrupted: Ctrl-C; the message says what is left.
    """
    began = perf_counter()
    published: list[Path] = []
    packaging.check_name(request.name)
    if request.resume is not None:
        check_path(request.resume)
    model_dir = request.out / request.name
    made = not model_dir.exists()
    try:
        with (
            temporary_folder(Path(tempfile.gettempdir()), WORK_PREFIX, 0o700) as work,
            staging_folder(model_dir) as staged,
        ):
            return _Build(request, progress, work, staged, began).run(published)
    except KeyboardInterrupt as error:
        raise BuildInterrupted(_what_is_left(request, model_dir, published)) from error
    except OSError as error:  # a full disk is told apart by `staging_folder`
        raise BuildError(f"cannot write the package to {model_dir}: {error}; choose another --out") from error
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty: the package is in it
                model_dir.rmdir()


def _what_is_left(request: BuildRequest, model_dir: Path, published: list[Path]) -> str:
    if published:
        return f"interrupted when {published[0]} was published already: the package is whole"
    left = f"interrupted: nothing was published, and the temporary files in {model_dir} are removed"
    if request.resume is not None and request.resume.exists():
        return f"{left}; {request.resume} holds the calibration so far, and the same command goes on there"
    return left


class _Build:
    def __init__(
        self, request: BuildRequest, progress: Progress, work: Path, staged: Path, began: float
    ) -> None:
        self._request = request
        self._progress = progress
        self._work = work
        self._staged = staged
        self._began = began
        self._notes: list[str] = []
        self._weigher = EvidenceWeigher(request, progress)

    def run(self, published: list[Path]) -> BuildOutcome:
        """published: gets the package's folder when it is visible."""
        request = self._request
        prepared, calibration, evaluation = self._read()
        self._notes += prepared.notes
        judged_on = self._judged_on(prepared, calibration, evaluation)
        calibration = self._to_calibrate(calibration, evaluation)
        self._weigher.weigh_data(calibration, judged_on)
        builder = VariantBuilder(prepared, calibration, judged_on, request, self._progress)
        if request.calibration_cache is not None:
            builder.reuse(request.calibration_cache)
        evaluator = VariantEvaluator(builder, judged_on, request, self._progress)
        self._weigher.weigh_answers(evaluator.reference, evaluator.judge, judged_on)
        candidates = [evaluator.build("fp32", self._staged)]
        if candidates[0].status != "pass":
            raise GateRefused(
                f"FP32 itself misses the budget, so nothing can keep it: {candidates[0].reason}"
            )
        precisions, not_built = self._precisions()
        for precision in precisions:
            self._progress.note(f"building {precision}")
            chooses = request.precisions == (AUTO,)
            candidates.append(attempt(evaluator, precision, self._staged, chooses=chooses))
        golden = packaging.write_golden(
            self._staged, prepared.model, judged_on, fixed_batch(judged_on, prepared.inputs)
        )
        candidates, latencies = prove_and_measure(
            prepared, evaluator, candidates, golden, self._staged, self._progress
        )
        if any(c.precision in QUANTIZED and c.kept for c in candidates):
            self._weigher.weigh_ranges(builder.ranges.peaks, list(builder.ranges.scales))
        decision = {RUNTIME: fastest(latencies, safest_first(list(latencies.median), PRECISIONS))}
        calibrated = self._write_calibration(builder)
        self._notes += builder.notes
        report = gather(
            request.name,
            builder,
            evaluator,
            candidates,
            latencies,
            decision[RUNTIME],
            not_built,
            self._staged,
            self._notes,
            self._facts(builder, calibration, evaluation),
            self._progress,
            self._weigher.warnings,
        )
        # What draws and fills the page is loaded in the last second of a build alone.
        from vernier.builder.reports.report_page import write_report

        write_report(self._staged, report)

        def make(version: int, files: Mapping[str, FileEntry], plans: Sequence[PlanEntry] = ()) -> Manifest:
            return Manifest(
                name=request.name,
                version=version,
                created=packaging.now_text(),
                source_sha256=prepared.source_sha256,
                calibration_sha256=None if calibration is None else calibration.sha256,
                evaluation_sha256=None if evaluation is None else evaluation.sha256,
                inputs=packaging.tensor_entries(prepared.inputs),
                outputs=packaging.tensor_entries(prepared.outputs),
                dims=prepared.dims,
                batching=prepared.batching,
                sequence=list(prepared.sequence),
                variants=self._entries(builder, evaluator, candidates, latencies),
                plans=list(plans),
                calibration=calibrated,
                golden=packaging.GOLDEN_NAME,
                files=dict(files),
                decision=decision,
                warnings=self._weigher.warnings,
                tools=tool_versions(),
            )

        plans = self._plans(make(1, entries_of(self._staged)))
        package, manifest = packaging.publish_numbered(
            self._staged, self._staged.parent, lambda version, files: make(version, files, plans)
        )
        published.append(package)
        return BuildOutcome(
            package=package,
            manifest=manifest,
            runtime=RUNTIME,
            variants=self._outcomes(builder, candidates, latencies, manifest, report),
            notes=tuple(self._notes),
            seconds=perf_counter() - self._began,
        )

    # --- data --------------------------------------------------------------------------------------
    def _read(self) -> tuple[PreparedModel, Samples | None, Samples | None]:
        request = self._request
        names = input_names(request.model)
        if request.precisions != ("fp32",) and not (request.calibration or request.evaluation):
            raise BuildError(
                "without data nothing can be proven about a reduced precision: give --eval (and --calibration for "
                "INT8), or build --precision fp32"
            )
        check_calibration_data(request)
        opened = {
            source: open_data(source, names, request.label_key, request.group_key)
            for source in (request.calibration, request.evaluation)
            if source is not None
        }
        example = next(
            ({n: a[:_EXAMPLE_ROWS] for n, a in arrays.items()} for arrays in opened.values()), None
        )
        with self._progress.task("preparing the model"):
            prepared = prepare(
                request.model,
                request.shapes,
                self._work,
                max_batch=request.max_batch,
                sequence=request.sequence,
                pad_values=request.pad_values,
                example=example,
            )
        found: list[ArraySamples | None] = []
        for source in (request.calibration, request.evaluation):
            if source is None:
                found.append(None)
                continue
            judges = source == self._weigher.judging_source
            named = judges and request.label_key != DEFAULT_LABEL_KEY
            samples = check_samples(opened[source], source, prepared.inputs, request.label_key, named)
            self._notes += whole_number_notes(opened[source], source, prepared.inputs)
            if prepared.batching.kind == "none":
                samples = one_request_each(samples, prepared.inputs)
            self._weigher.survey(source, opened[source], samples)
            if judges:
                self._weigher.weigh_unread(opened[source], names)
            found.append(samples)
        return prepared, found[0], found[1]

    def _judged_on(
        self, prepared: PreparedModel, calibration: Samples | None, evaluation: Samples | None
    ) -> Samples:
        if evaluation is not None:
            return evaluation
        if calibration is None:
            self._notes.append("there was no data: the golden vectors hold random inputs")
            return packaging.made_up_samples(prepared, self._work)
        self._notes.append(
            "there was no --eval data: a third of the calibration data was kept back for the gate"
        )
        return split_apart(calibration, max(1, round(len(calibration) * _HELD_BACK)))[0]

    def _to_calibrate(self, calibration: Samples | None, evaluation: Samples | None) -> Samples | None:
        if calibration is None:
            return None
        if evaluation is None and len(calibration) > 1:
            calibration = split_apart(calibration, max(1, round(len(calibration) * _HELD_BACK)))[1]
        most = self._request.calibration_samples
        return calibration if most is None else limit(calibration, most)

    # --- variants ----------------------------------------------------------------------------------
    def _precisions(self) -> tuple[list[str], dict[str, str]]:
        """What to build besides FP32, the safest first, and why nothing else is worth trying."""
        if self._request.precisions != (AUTO,):
            return [precision for precision in self._request.precisions if precision != "fp32"], {}
        wishes = self._request.plans
        if wishes is None:
            names, not_built = worth_building(RUNTIME)
        else:
            names, not_built = worth_building(wishes.runtime, wishes.compute_capabilities)
        return [name for name in names if name != "fp32"], not_built

    def _entries(
        self,
        builder: VariantBuilder,
        evaluator: VariantEvaluator,
        candidates: list[VariantCandidate],
        latencies: Latencies,
    ) -> dict[str, VariantEntry]:
        return {
            c.precision: VariantEntry(
                precision=c.precision,
                files=list(c.files),
                gates=c.gates or {},
                latency_ms=_latency_entry(latencies.median.get(c.precision)),
                assignment=builder.assignment(c.recipe) if c.recipe else {},
                budget=evaluator.limits(c.precision),
                lowerings=lowerings_of(c),
            )
            for c in candidates
            if c.kept
        }

    def _facts(
        self, builder: VariantBuilder, calibration: Samples | None, evaluation: Samples | None
    ) -> dict[str, str]:
        """What the package was made from, for the report."""
        request = self._request
        found = {"model": f"{request.model.name}, sha256 {builder.prepared.source_sha256}"}
        for label, source, samples in (
            ("calibration data", request.calibration, calibration),
            ("evaluation data", request.evaluation, evaluation),
        ):
            if source is not None and samples is not None:
                found[label] = f"{Path(source).name}, {len(samples)} samples, sha256 {samples.sha256}"
        if calibrated := builder.calibrated:
            found["calibration"] = calibrated
        found["tools"] = ", ".join(f"{name} {version}" for name, version in tool_versions().items())
        found["built"] = packaging.now_text()
        return found

    def _write_calibration(self, builder: VariantBuilder) -> CalibrationEntry | None:
        record = builder.calibration_record(tool_versions())
        if record is None:
            return None
        write_calibration(self._staged, record)
        return CalibrationEntry(cache=CACHE_NAME, sidecar=SIDECAR_NAME)

    def _plans(self, manifest: Manifest) -> list[PlanEntry]:
        """Plans of every variant that the wished-for GPUs can run. Raises BuildError."""
        wishes = self._request.plans
        if wishes is None:
            return []
        with self._progress.task(f"building plans for {wishes.runtime}"):
            try:
                entries, left_out = add_plans(self._staged, manifest, wishes)
            except EngineError as error:
                raise BuildError(error.message) from error
        self._notes += left_out
        return entries

    def _outcomes(
        self,
        builder: VariantBuilder,
        candidates: Sequence[VariantCandidate],
        latencies: Latencies,
        manifest: Manifest,
        report: BuildReport,
    ) -> tuple[VariantOutcome, ...]:
        """How every precision fared; a choice that was left to the build is explained for each."""
        auto = self._request.precisions == (AUTO,)
        why = {variant.precision: variant.explanation for variant in report.variants} if auto else {}
        built = [
            self._outcome(builder, c, latencies, manifest, why.get(c.precision, c.reason)) for c in candidates
        ]
        names = {c.precision for c in candidates}
        skipped = [VariantOutcome(p, "skipped", reason) for p, reason in why.items() if p not in names]
        return (*built, *skipped)

    def _outcome(
        self,
        builder: VariantBuilder,
        candidate: VariantCandidate,
        latencies: Latencies,
        manifest: Manifest,
        reason: str,
    ) -> VariantOutcome:
        return VariantOutcome(
            precision=candidate.precision,
            status=candidate.standing,
            refused=candidate.status == "refused",
            reason=reason,
            bytes=sum(manifest.files[name].bytes for name in candidate.files),
            gate=(candidate.gates or {}).get(RUNTIME) or next(iter((candidate.gates or {}).values()), None),
            latency_ms=latencies.median.get(candidate.precision, {}),
            assignment=builder.assignment(candidate.recipe) if candidate.recipe else {},
            fault=candidate.fault,
        )


def _latency_entry(curve: Mapping[int, float] | None) -> dict[str, dict[str, float]]:
    if not curve:
        return {}
    return {RUNTIME: {str(bucket): round(ms, 6) for bucket, ms in curve.items()}}
