"""Which models are loaded, and how they come and go while the service runs.

Loading and verifying happen on worker threads; everything that a request sees changes on the event
loop's thread in one step, so that a request finds a model either whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vernier.border.resolution import find_model
from vernier.border.signature import Signature
from vernier.engine.base import Executor
from vernier.engine.validated import ValidatedEngine
from vernier.errors import EngineError, PackageError, UnknownModel, VernierError, shown
from vernier.exposition import Metrics
from vernier.heap import trim_heap
from vernier.metrics import ModelMetrics
from vernier.package.integrity import list_versions, open_package
from vernier.package.manifest import NAME_PATTERN, Manifest
from vernier.serving.models.description import describe
from vernier.serving.models.folder import (
    Changes,
    Fingerprint,
    Key,
    Pending,
    compare,
    fingerprint,
    list_packages,
    look,
)
from vernier.serving.models.loading import EngineLoader, LoadedEngines
from vernier.serving.monitoring.precision import PrecisionMonitor
from vernier.serving.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """One served version of one model."""

    manifest: Manifest
    signature: Signature
    engines: LoadedEngines
    scheduler: Scheduler
    monitor: PrecisionMonitor | None
    metrics: ModelMetrics
    runtime: str
    state: str = "ready"

    @cached_property
    def name(self) -> str:
        return self.manifest.name

    @cached_property
    def version(self) -> str:
        return str(self.manifest.version)

    @property
    def precision(self) -> str:
        """The variant that new batches take."""
        return self.scheduler.precision

    @property
    def executors(self) -> dict[str, Executor]:
        return self.engines.executors

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(self.engines.executors)

    def description(self) -> dict[str, Any]:
        """What `GET /v1/models/{name}` answers."""
        return describe(self.manifest, self.executors, self.engines.curves, self.precision, self.runtime)


#: Starts a model's scheduler, and its precision monitor where there is something to watch; on the event
#: loop's thread. Raises EngineError, having released what it took. Wired in vernier.main.
Starter = Callable[
    [Manifest, LoadedEngines, ModelMetrics], Awaitable[tuple[Scheduler, PrecisionMonitor | None]]
]


class Repository:
    """The loaded models. Every method but the constructor belongs to the event loop's thread."""

    def __init__(
        self,
        engines_dir: Path,
        loader: EngineLoader,
        start: Starter,
        metrics: Metrics,
        precision_of: Callable[[str], str],
        drain_timeout_s: float,
    ) -> None:
        self._dir = engines_dir
        self._loader = loader
        self._start = start
        self._metrics = metrics
        self._precision_of = precision_of
        self._drain_timeout_s = drain_timeout_s
        self._models: dict[str, dict[int, LoadedModel]] = {}
        self._refused: dict[Key, str] = {}
        self._tried: dict[Key, Fingerprint] = {}  # loaded, refused or unloaded by hand, with its files then
        self.unloaded: set[Key] = set()
        self._loading = 0
        self._awaited: dict[str, set[int]] = {}  # what load_all has found on disk and not tried yet
        self._changes = asyncio.Lock()
        self._before_retiring: Callable[[LoadedModel], Awaitable[None]] | None = None
        self._installing: set[asyncio.Task[None]] = set()

    # --- what requests ask ------------------------------------------------------------------------
    def models(self) -> list[LoadedModel]:
        """Every served version, by name and version."""
        return [self._models[name][v] for name in sorted(self._models) for v in sorted(self._models[name])]

    def resolve(self, name: str | None, version: str | None) -> LoadedModel:
        """The asked version, or the newest. Raises UnknownModel, UnknownVersion, NotReady."""
        return find_model(self._models, self._awaited, name, version, self.not_ready_reason)

    def awaited(self) -> dict[str, list[int]]:
        """Name → versions that `load_all` has found on disk and not tried yet."""
        return {name: sorted(versions) for name, versions in self._awaited.items()}

    def not_ready_reason(self) -> str | None:
        """None when every loaded model can execute; else a sentence."""
        if self._loading:
            return f"still loading models from {self._dir}"
        if not self._models:
            if self._refused:
                return f"no package in {self._dir} could be loaded: {next(iter(self._refused.values()))}"
            if self.unloaded:
                return f"every package in {self._dir} was unloaded by hand; load one"
            return f"there is no engine package in {self._dir}; build one with build_engine.py"
        for model in self.models():
            fault = model.scheduler.fault
            if fault is not None:
                return f"model '{model.name}' version {model.version} cannot run: {fault}"
        return None

    # --- how they come and go ---------------------------------------------------------------------
    async def load_all(self, unloaded: Collection[Key] = ()) -> None:
        """Loads every package under the engines folder; a bad one is refused and the others are served.

        Args:
            unloaded: packages that were unloaded by hand before, and stay so until their files change.
        """
        async with self._changes:
            self._loading += 1
            try:
                listing = await asyncio.to_thread(list_packages, self._dir)
                for name, reason in listing.unreadable.items():
                    logger.error("folder refused", extra={"model": name, "reason": reason})
                self.unloaded = {key for key in listing.packages if key in unloaded}
                self._tried |= {key: listing.packages[key].files for key in self.unloaded}
                wanted = [key for key in listing.packages if key not in self.unloaded]
                for name, version in wanted:
                    self._awaited.setdefault(name, set()).add(version)
                for name, version in wanted:
                    await self._load_or_refuse(name, version)
                    self._awaited[name].discard(version)
                    if not self._awaited[name]:
                        del self._awaited[name]
            finally:
                self._awaited = {}
                self._loading -= 1

    async def look(self, pending: Pending, now: float) -> Pending:
        """Loads what is new or changed in the engines folder, and retires what has vanished.

        Returns what the next look has to know. Raises OSError when the folder cannot be read.
        """
        async with self._changes:
            served = {(model.name, model.manifest.version) for model in self.models()}
            listing = await asyncio.to_thread(look, self._dir, served, dict(self._tried))
            changes, left = compare(listing, served, self._tried, pending, now)
            for name in left.unreadable - pending.unreadable:
                logger.error("folder refused", extra={"model": name, "reason": listing.unreadable[name]})
            for name, version in changes.load:
                await self._load_or_refuse(name, version)
            await self._forget(changes)
        return left

    async def _forget(self, changes: Changes) -> None:
        """Retires packages whose folders have vanished."""
        for name, version in changes.gone:
            logger.info("the package is gone", extra={"model": name, "version": version})
            self._tried.pop((name, version), None)
            self.unloaded.discard((name, version))
            self._refused.pop((name, version), None)
            if version in self._models.get(name, {}):
                await self._take_out(name, [version])
        for name, version in changes.kept:
            logger.error(
                "the package is gone and is served on, since nothing else is; unload it by hand if it should end",
                extra={"model": name, "version": version},
            )

    async def _load_or_refuse(self, name: str, version: int) -> None:
        try:
            await self._load(name, version)
        except VernierError as error:
            self._refused[name, version] = error.message
            reason = "package" if isinstance(error, PackageError) else "engine"
            self._metrics.package_refused(name, str(version), reason)
            logger.error(
                "package refused", extra={"model": name, "version": version, "reason": error.message}
            )

    async def load(self, name: str, version: int | None = None) -> LoadedModel:
        """Loads one version (the newest by default), replacing it when it is loaded already.

        Raises UnknownModel, PackageError or EngineError; what was served before is served still then.
        """
        if re.fullmatch(NAME_PATTERN, name) is None:  # else ".." or a NUL would become part of a path
            raise UnknownModel(
                f"{shown(name)} is no name of a model; there is no such package in {self._dir}"
            )
        async with self._changes:
            versions = await asyncio.to_thread(list_versions, self._dir / name)
            if not versions or (version is not None and version not in versions):
                raise UnknownModel(f"there is no package {name}/{version or ''} in {self._dir}")
            return await self._load(name, version or versions[-1])

    async def _load(self, name: str, version: int) -> LoadedModel:
        started = time.monotonic()
        package = self._dir / name / str(version)
        self._tried[name, version] = await asyncio.to_thread(fingerprint, package)
        self.unloaded.discard((name, version))
        manifest, engines = await asyncio.to_thread(self._open, package, name)
        metrics = self._metrics.model(name, str(version))
        try:
            scheduler, monitor = await self._start(manifest, engines, metrics)
        except BaseException:
            engines.close()
            raise
        signature = Signature.of(manifest)
        model = LoadedModel(manifest, signature, engines, scheduler, monitor, metrics, self._loader.runtime)
        self._publish_metrics(model)
        replaced = self._models.setdefault(name, {}).get(version)
        self._models[name][version] = model
        self._refused.pop((name, version), None)
        logger.info(
            "model loaded",
            extra={
                "model": name,
                "version": version,
                "precision": model.precision,
                "runtime": model.runtime,
                "variants": list(model.precisions),
                "refused": engines.refused,
                "seconds": round(time.monotonic() - started, 3),
            },
        )
        loop = asyncio.get_running_loop()

        def arrived(ready: ValidatedEngine) -> None:
            loop.call_soon_threadsafe(self._engine_arrived, model, ready)

        engines.subscribe(arrived)
        if replaced is not None:
            await self._retire(replaced)
        await asyncio.to_thread(trim_heap)
        return model

    def _engine_arrived(self, model: LoadedModel, ready: ValidatedEngine) -> None:
        task = asyncio.create_task(self._install(model, ready))
        self._installing.add(task)
        task.add_done_callback(self._installing.discard)

    async def _install(self, model: LoadedModel, ready: ValidatedEngine) -> None:
        """A rebuilt engine joins a model that is served; traffic moves to it when it is the better one."""
        precision = ready.executor.precision
        try:
            await model.scheduler.install(ready.executor, ready.curve)
        except EngineError as error:
            logger.error(
                "engine not installed",
                extra={"model": model.name, "precision": precision, "reason": error.message},
            )
            return
        model.executors[precision] = ready.executor
        model.engines.curves[precision] = dict(ready.curve)
        if model.monitor is not None:
            model.monitor.join(ready.executor)
        best = model.engines.best()
        if best in model.executors and best != model.precision:
            if model.monitor is not None:
                model.monitor.prefer(best)
            else:
                model.scheduler.set_precision(best)
        self._publish_metrics(model)
        logger.info(
            "engine installed",
            extra={"model": model.name, "precision": precision, "serving": model.precision},
        )

    def _open(self, package: Path, name: str) -> tuple[Manifest, LoadedEngines]:
        manifest = open_package(package)
        return manifest, self._loader.load(package, manifest, self._precision_of(name))

    def _publish_metrics(self, model: LoadedModel) -> None:
        metrics = model.metrics
        metrics.watch_launches(lambda: _launches(model.executors))
        for precision, executor in model.executors.items():
            entry = model.manifest.variants[precision]
            metrics.engine_loaded(precision, model.runtime, executor.engine_bytes, executor.load_seconds)
            metrics.precision_budget(precision, entry.budget)
            gate = entry.gates.get(model.runtime)
            if gate is not None:
                metrics.gate_error(precision, model.runtime, gate.metrics)
        wanted = model.manifest.decision.get(model.runtime)
        for precision, reason in model.engines.refused.items():
            logger.warning(
                "variant refused",
                extra={
                    "model": model.name,
                    "version": model.version,
                    "precision": precision,
                    "reason": reason,
                },
            )
            if precision == wanted:
                metrics.fallback(precision, model.precision, "self_test")
        metrics.precision_active(model.precision, model.runtime)

    async def unload(self, name: str, version: int | None = None) -> None:
        """Takes a version (or all) out of service, then waits for what it had admitted. Raises UnknownModel."""
        async with self._changes:
            versions = self._models.get(name)
            if versions is None or (version is not None and version not in versions):
                raise UnknownModel(f"model {shown(name)} {version or ''} is not loaded")
            leaving = [version] if version is not None else list(versions)
            for each in leaving:  # it stays unloaded until its files change
                self._tried[name, each] = await asyncio.to_thread(fingerprint, self._dir / name / str(each))
                self.unloaded.add((name, each))
            await self._take_out(name, leaving)

    async def _take_out(self, name: str, versions: list[int]) -> None:
        """Retires served versions of a model, which leave together."""
        leaving = [self._models[name].pop(version) for version in versions]
        if not self._models[name]:
            del self._models[name]
        for model in leaving:
            await self._retire(model)
            self._metrics.forget(model.name, model.version)
        await asyncio.to_thread(trim_heap)

    def before_retiring(self, call: Callable[[LoadedModel], Awaitable[None]]) -> None:
        """Has `call` awaited for a model that has left the served ones, before it is drained."""
        self._before_retiring = call

    async def _retire(self, model: LoadedModel) -> None:
        model.state = "unloading"
        if self._before_retiring is not None:
            await self._before_retiring(model)
        if model.monitor is not None:
            await model.monitor.close(self._drain_timeout_s)
        await model.scheduler.drain(self._drain_timeout_s)
        await asyncio.to_thread(model.engines.close)

    async def close(self) -> None:
        """Finishes what was admitted and releases everything."""
        async with self._changes:
            leaving = self.models()
            self._models.clear()
            await asyncio.gather(*(self._retire(model) for model in leaving))


def _launches(executors: dict[str, Executor]) -> tuple[int, int]:
    counts = [executor.launches for executor in executors.values()]
    return sum(graph for graph, _ in counts), sum(plain for _, plain in counts)
