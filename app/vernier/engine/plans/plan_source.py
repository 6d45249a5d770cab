"""Where a variant's plan comes from on this machine: the package, the cache, or a builder process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from vernier.errors import EngineError, PackageError
from vernier.package.integrity import resolve_inside, sha256_file, verify_file
from vernier.package.manifest import FileEntry, Manifest, PlanEntry
from vernier.package.plan_cache import PlanCache, plan_entry
from vernier.package.plans import Target, fit, variant_files, variant_sha256


class Cancellation:
    """Ends what is being built for one package, whichever thread asks for it and however early."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._callback: Optional[Callable[[], None]] = None

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._callback is not None:
                self._callback()

    def watch(self, callback: Optional[Callable[[], None]]) -> None:
        """Calls `callback` when it is cancelled, at once if it was; None takes the last one away."""
        with self._lock:
            self._callback = callback
            if self._cancelled and callback is not None:
                callback()


@dataclass(frozen=True)
class RebuildRequest:
    """What a builder needs to know.

    model: the ONNX file, verified; timing_cache: may not exist yet.
    profiles: how many contexts will run at once.
    device_index: the GPU to time tactics on.
    cancellation: a builder registers there how to end it.
    """

    model: Path
    manifest: Manifest
    precision: str
    target: Target
    profiles: int
    timing_cache: Path
    device_index: int
    cancellation: Cancellation


#: Builds a plan and returns its bytes. Raises EngineError with one sentence.
PlanBuilder = Callable[[RebuildRequest], bytes]


class PlanSource:
    """Finds the plans of one package for one target, and says why those that do not fit don't."""

    def __init__(self, package: Path, manifest: Manifest, target: Target, cache: PlanCache) -> None:
        self._package = package
        self._manifest = manifest
        self._target = target
        self._cache = cache

    def fitting(self, precision: str) -> Tuple[List[PlanEntry], List[str]]:
        """The plans of `precision` that may be loaded here, and one sentence for each that may not.

        Raises PlanMismatch when the package has no graph for this runtime at all.
        """
        wanted = self._wanted(precision)
        entries: List[PlanEntry] = []
        reasons: List[str] = []
        for plan in self._plans():
            if plan.precision == precision:
                reason = fit(plan, self._target, wanted)
                if reason is None:
                    entries.append(plan)
                else:
                    reasons.append(reason)
        return entries, reasons or ([] if entries else [f"the package has no {precision} plan"])

    def _plans(self) -> Iterator[PlanEntry]:
        yield from self._manifest.plans
        try:
            yield from self._cache.plans()
        except PackageError:
            # A cache that others can write is not read; `store` says so when it comes to that.
            return

    def read(self, plan: PlanEntry) -> bytes:
        """The plan's bytes, after its hash was compared. Raises PackageError."""
        if plan not in self._manifest.plans:
            return self._cache.read(plan)
        path = verify_file(self._package, plan.path, FileEntry(sha256=plan.sha256, bytes=plan.bytes))
        return path.read_bytes()

    def request(
        self, precision: str, profiles: int, device_index: int, cancellation: Cancellation
    ) -> RebuildRequest:
        """What to build for `precision`, its files verified again. Raises PackageError, PlanMismatch."""
        files = variant_files(self._manifest.variants[precision], self._target)
        for name in files:
            path = resolve_inside(self._package, name)
            if sha256_file(path) != self._manifest.files[name].sha256:
                raise PackageError(f"{path} was changed since it was loaded; build the package again")
        return RebuildRequest(
            model=resolve_inside(self._package, files[0]),
            manifest=self._manifest,
            precision=precision,
            target=self._target,
            profiles=profiles,
            timing_cache=self._cache.timing_cache(self._target),
            device_index=device_index,
            cancellation=cancellation,
        )

    def entry(self, precision: str, data: bytes) -> PlanEntry:
        """The entry of a plan built for this target, whether or not it is kept."""
        return plan_entry(data, precision, self._target, self._wanted(precision))

    def store(self, precision: str, data: bytes) -> PlanEntry:
        """Keeps a rebuilt plan for the next start. Raises OSError, PackageError."""
        return self._cache.add(data, precision, self._target, self._wanted(precision))

    def _wanted(self, precision: str) -> str:
        return variant_sha256(self._manifest, self._manifest.variants[precision], self._target)


class BuilderProcess:
    """Builds in a process of its own: a builder that crashes or eats memory cannot end the service."""

    def __init__(self, timeout_s: float = 3600.0) -> None:
        self._timeout_s = timeout_s

    def __call__(self, request: RebuildRequest) -> bytes:
        """Raises EngineError."""
        with tempfile.TemporaryDirectory(prefix="vernier-plan-") as folder:
            wanted, out = Path(folder, "request.json"), Path(folder, "plan")
            wanted.write_text(json.dumps(request_fields(request)), "utf-8")
            process = subprocess.Popen(
                [sys.executable, "-m", "vernier.builder.plans.plan", str(wanted), str(out)],
                cwd=Path(__file__).resolve().parents[3],
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": visible_device(os.environ, request.device_index),
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            request.cancellation.watch(process.terminate)
            try:
                self._wait(process)
            finally:
                request.cancellation.watch(None)
            return out.read_bytes()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        try:
            _, complaint = process.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise EngineError(f"the builder took longer than {self._timeout_s:.0f} s") from None
        if process.returncode != 0:
            lines = complaint.decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1] if lines else "it said nothing"
            raise EngineError(f"the builder ended with code {process.returncode}: {reason}")


def visible_device(environment: Mapping[str, str], index: int) -> str:
    """CUDA_VISIBLE_DEVICES for a process whose only GPU is this process' GPU `index`."""
    visible = [part for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return visible[index] if index < len(visible) else str(index)


def request_fields(request: RebuildRequest) -> Dict[str, object]:
    """The request as `python -m vernier.builder.plans.plan` reads it."""
    manifest, target = request.manifest, request.target
    return {
        "model": str(request.model),
        "inputs": [[t.name, t.dtype, t.shape] for t in manifest.inputs],
        "options": {
            "runtime": target.runtime,
            "precision": request.precision,
            "dims": {name: r.model_dump() for name, r in manifest.dims.items()},
            "profiles": request.profiles,
            "compute_capabilities": [target.compute_capability] if target.runtime == "tensorrt-rtx" else [],
            "timing_cache": str(request.timing_cache),
        },
    }
