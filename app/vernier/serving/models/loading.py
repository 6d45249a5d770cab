"""From a verified package to executors that have proven themselves on this machine.

A loader is one runtime's way to do it. The repository asks it for a model's executors and is told
which variant new batches should take; why others were left out is logged and counted there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vernier.engine.base import Executor
from vernier.engine.ort import OnnxRuntimeExecutor
from vernier.engine.selftest import self_test
from vernier.engine.validated import ValidatedEngine
from vernier.errors import EngineError, PackageError
from vernier.package.golden import GoldenVectors, golden_of
from vernier.package.integrity import resolve_inside
from vernier.package.manifest import PRECISIONS, Manifest, VariantEntry

logger = logging.getLogger(__name__)


@dataclass
class LoadedEngines:
    """Executors by precision, the active one's name, and why each other variant was left out.

    curves: precision → bucket → seconds, as measured on this device.
    """

    executors: dict[str, Executor]
    active: str
    refused: dict[str, str] = field(default_factory=dict)
    golden: GoldenVectors | None = None
    curves: dict[str, dict[int, float]] = field(default_factory=dict)

    def subscribe(self, arrived: Callable[[ValidatedEngine], None]) -> None:
        """`arrived` is called, from any thread, for every engine that becomes ready after loading."""

    def best(self) -> str:
        """The precision that new batches should take, of those that are ready."""
        return self.active

    def close(self) -> None:
        for executor in self.executors.values():
            executor.close()


def expected_curves(manifest: Manifest, engines: LoadedEngines) -> dict[str, dict[int, float]]:
    """Precision → bucket → seconds: as measured on this device, else as the build measured it on its own."""
    curves = {}
    for precision, executor in engines.executors.items():
        built_ms = manifest.variants[precision].latency_ms.get(executor.runtime, {})
        built = {int(bucket): ms / 1e3 for bucket, ms in built_ms.items()}
        curves[precision] = engines.curves.get(precision) or built
    return curves


class EngineLoader(Protocol):
    """One runtime on one machine."""

    runtime: str

    def load(self, package: Path, manifest: Manifest, precision: str) -> LoadedEngines:
        """Blocks; called outside the event loop's thread, after every file's hash was verified.

        Args:
            precision: a variant's name, or `auto` for the fastest inside its budget.

        Raises:
            PackageError, EngineError: not even the FP32 variant can be trusted.
        """


def choose_precision(
    manifest: Manifest, runtime: str, wanted: str, loaded: Sequence[str]
) -> tuple[str, str | None]:
    """Which loaded variant new batches take, and a sentence when that is not what was wanted.

    `auto` takes the build's decision for this runtime; without one, the variant with the lowest
    median latency at the largest measured bucket; without a measurement, FP32.
    """
    if wanted != "auto":
        if wanted in loaded:
            return wanted, None
        chosen, _ = choose_precision(manifest, runtime, "auto", loaded)
        return chosen, f"precision '{wanted}' was asked for, but the package offers {', '.join(loaded)}"
    decided = manifest.decision.get(runtime)
    if decided in loaded and decided is not None:
        return decided, None
    curves = {p: manifest.variants[p].latency_ms.get(runtime, {}) for p in loaded}
    shared = set.intersection(*(set(curve) for curve in curves.values())) if curves else set()
    if shared:
        bucket = max(shared, key=int)
        return min(loaded, key=lambda p: curves[p][bucket]), None
    return "fp32", None


class OnnxRuntimeLoader:
    """The CPU: nothing to build, every variant is its ONNX file."""

    runtime = "onnxruntime"

    def __init__(self, intra_op_threads: Callable[[Manifest], int]) -> None:
        self._intra_op_threads = intra_op_threads

    def load(self, package: Path, manifest: Manifest, precision: str) -> LoadedEngines:
        golden = golden_of(package, manifest)
        threads = self._intra_op_threads(manifest)
        engines = LoadedEngines({}, "fp32", golden=golden)
        try:
            for name in sorted(manifest.variants, key=PRECISIONS.index):
                reason = self._try_variant(package, manifest.variants[name], golden, engines, threads)
                if reason is not None:
                    if name == "fp32":
                        raise PackageError(
                            f"{package}: the fp32 variant failed: {reason}; build the package again"
                        )
                    engines.refused[name] = reason
        except BaseException:
            engines.close()
            raise
        engines.active, note = choose_precision(manifest, self.runtime, precision, list(engines.executors))
        if note:
            logger.warning("%s; serving %s", note, engines.active, extra={"model": manifest.name})
        return engines

    def _try_variant(
        self,
        package: Path,
        variant: VariantEntry,
        golden: GoldenVectors | None,
        engines: LoadedEngines,
        threads: int,
    ) -> str | None:
        """Loads one variant into `engines`; a sentence when it cannot be trusted here."""
        gate = variant.gates.get(self.runtime)
        if gate is not None and not gate.passed:
            return f"its gate on {self.runtime} was not passed: {gate.reason}"
        try:
            executor = OnnxRuntimeExecutor(
                resolve_inside(package, variant.files[0]),
                precision=variant.precision,
                intra_op_threads=threads,
            )
        except EngineError as error:
            return error.message
        reason = self_test(executor, golden, variant.budget) if golden is not None else None
        if reason is None:
            engines.executors[variant.precision] = executor
        else:
            executor.close()
        return reason
