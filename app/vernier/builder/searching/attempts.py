"""Keeps one variant's failure from costing the others theirs: each is built, and proven, on its own.

What concerns the whole build goes on up: the calibration's state, data that changed meanwhile, a full disk.
"""

from __future__ import annotations

import os
import shutil
import traceback
from pathlib import Path

from vernier.builder.graphs.prepare import PreparedModel
from vernier.builder.progress import Progress
from vernier.builder.searching.candidates import VariantCandidate, VariantEvaluator
from vernier.builder.searching.latency import Latencies, batches_of, measure
from vernier.engine.ort import OnnxRuntimeExecutor
from vernier.engine.selftest import self_test
from vernier.errors import BuildError, DataChanged, EngineError, ResumeError
from vernier.package.golden import GoldenVectors


def attempt(evaluator: VariantEvaluator, precision: str, folder: Path, *, chooses: bool) -> VariantCandidate:
    """Builds one precision besides FP32 into `folder`; whatever fails, its files are gone and the candidate says so.

    Args:
        chooses: whether the build chooses precisions by itself: then one that cannot be built is `skipped`, else
            `failed`, since somebody asked for it.
    """
    before = set(folder.iterdir())
    try:
        return evaluator.build(precision, folder)
    except (ResumeError, DataChanged, OSError):
        raise
    except BuildError as error:
        failed = VariantCandidate(precision, "skipped" if chooses else "failed", error.message)
    except Exception as error:  # a fault of ours, or of a library: the others are as good as without it
        failed = VariantCandidate(precision, "failed", _fault_sentence(error), fault=traceback.format_exc())
    for path in set(folder.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return failed


def _fault_sentence(error: BaseException) -> str:
    return f"a fault in Vernier, not in the input: {type(error).__name__}: {error}".rstrip(": ")


def prove_and_measure(
    prepared: PreparedModel,
    evaluator: VariantEvaluator,
    candidates: list[VariantCandidate],
    golden: GoldenVectors,
    folder: Path,
    progress: Progress,
) -> tuple[list[VariantCandidate], Latencies]:
    """Each variant as the service will load it: its self-test first, then its latency."""
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    executors: dict[str, OnnxRuntimeExecutor] = {}
    proven = []
    try:
        for c in candidates:
            if c.runs_here:
                failure: str | None
                try:
                    executors[c.precision] = OnnxRuntimeExecutor(
                        folder / c.files[0], precision=c.precision, intra_op_threads=threads
                    )
                    failure = self_test(
                        executors[c.precision], golden, evaluator.limits(c.precision), _rows(prepared)
                    )
                except EngineError as error:
                    failure = error.message
                if failure is not None:
                    if c.precision in executors:
                        executors.pop(c.precision).close()
                    c = evaluator.failed_here(c, failure)
            proven.append(c)
        return proven, measure(executors, batches_of(golden.inputs, prepared.batching), progress)
    finally:
        for executor in executors.values():
            executor.close()


def _rows(prepared: PreparedModel) -> int:
    """The most rows that one execution takes."""
    if prepared.batching.dim is not None:
        return prepared.dims[prepared.batching.dim].max
    return prepared.batching.size or 1
