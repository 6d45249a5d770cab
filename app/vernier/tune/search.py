"""Tries settings under load, one at a time, on the real scheduler and the real executors.

For every number of slots the search starts at the settings that the measured latency curve suggests, and changes
one setting after the other to whichever value sustains most. How much a candidate sustains is found by
bracketing: the rate rises by a half until it is too much, then the gap is halved.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import CollectorRegistry

from vernier.builder.progress import Advance, Progress
from vernier.composition.engine import (
    DEFAULT_GPU_SLOTS,
    batch_layout,
    make_loader,
    model_settings,
    shared_device,
    start_scheduler,
)
from vernier.cores import available_cores
from vernier.engine.curve import measure_curve
from vernier.exposition import Metrics
from vernier.metrics import ModelMetrics
from vernier.package.integrity import open_package
from vernier.package.manifest import Manifest
from vernier.serving.models.loading import EngineLoader, LoadedEngines, OnnxRuntimeLoader
from vernier.serving.scheduling.scheduler import Scheduler
from vernier.settings import ModelSettings, Settings
from vernier.tensors import Arrays
from vernier.tune.candidates import (
    Measured,
    SettingsCandidate,
    batch_choices,
    best,
    bucket_choices,
    delay_choices,
    neighbours,
    sequence_choices,
)
from vernier.tune.load import Outcome, offer

#: Share of all requests that must be answered within the objective.
GOAL = 0.99
#: A first load that is not counted: caches fill, estimates settle.
_WARM_UP_S = 0.2
_STEP, _HALVINGS, _MAX_STEPS = 1.5, 3, 12
#: Loads of fewer requests say nothing.
_MIN_REQUESTS = 5
#: The common load, as a share of what the first candidate sustains.
_COMMON = 0.5


@dataclass(frozen=True)
class Wish:
    """What the command line asks for.

    Attributes:
        rows: of each request.
        seconds: of one load.
        slots: the numbers of slots to try; None for what the machine suggests.
    """

    package: Path
    objective_ms: float
    rows: int = 1
    seconds: float = 1.5
    seed: int = 0
    slots: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Tuning:
    """What came of it.

    Attributes:
        before: the settings that were in force; tried first.
        common_rate: requests per second of the load at which all candidates' latencies were taken.
        lone_ms: how long a request takes when there is no other.
    """

    manifest: Manifest
    runtime: str
    precision: str
    objective_ms: float
    before: Measured
    measured: list[Measured]
    chosen: Measured | None
    common_rate: float
    lone_ms: float


async def tune(wish: Wish, requests: Sequence[Arrays], settings: Settings, progress: Progress) -> Tuning:
    """Searches. Raises PackageError, EngineError or SettingsError when the package cannot be served here."""
    manifest = await asyncio.to_thread(open_package, wish.package)
    search = _TuningSearch(wish, manifest, requests, settings)
    with progress.task(f"tuning {manifest.name} for {wish.objective_ms:g} ms", search.total) as advance:
        for slots in search.slot_choices:
            await search.try_slots(slots, advance)
    return search.result()


class _TuningSearch:
    def __init__(
        self, wish: Wish, manifest: Manifest, requests: Sequence[Arrays], settings: Settings
    ) -> None:
        self._wish = wish
        self._manifest = manifest
        self._requests = requests
        self._settings = settings
        self._metrics = Metrics(CollectorRegistry(), "tuning")
        self._runtime = self._loader(settings).runtime
        on_cpu = self._runtime == OnnxRuntimeLoader.runtime
        in_force = model_settings(settings, manifest, self._runtime)
        layout = batch_layout(manifest, in_force)
        self._first = SettingsCandidate(
            in_force.slots or 1,
            layout.largest,
            in_force.max_queue_delay_ms or 0.0,
            in_force.buckets,
            in_force.sequence_buckets,
        )
        cores = available_cores()
        usual = {1, max(1, cores // 2), cores} if on_cpu else {1, DEFAULT_GPU_SLOTS, DEFAULT_GPU_SLOTS + 1}
        wanted = wish.slots or tuple(sorted(usual))
        self.slot_choices = [self._first.slots, *[s for s in wanted if s != self._first.slots]]
        self._delays = delay_choices(wish.objective_ms)
        self._sequences = sequence_choices(manifest)
        self._measured: dict[str, Measured] = {}
        self._common = 0.0
        self._guess = 0.0
        self._lone_s = float("inf")
        self._precision = ""
        # What each number of slots may cost: its start, two other batches, delays, two bucket sets, lengths.
        self.total = len(self.slot_choices) * (5 + len(self._delays) + len(self._sequences) - 1)

    def _loader(self, settings: Settings) -> EngineLoader:
        return make_loader(settings, self._metrics, CollectorRegistry())

    def _with(self, options: ModelSettings) -> Settings:
        return self._settings.model_copy(
            update={"models": {**self._settings.models, self._manifest.name: options}}
        )

    def result(self) -> Tuning:
        measured = list(self._measured.values())
        return Tuning(
            self._manifest,
            self._runtime,
            self._precision,
            self._wish.objective_ms,
            measured[0],
            measured,
            best(measured),
            self._common,
            1e3 * self._lone_s,
        )

    async def try_slots(self, slots: int, advance: Advance) -> None:
        """Every candidate with this number of slots that the search leads to."""
        manifest, wish = self._manifest, self._wish
        options = replace(self._first, slots=slots).settings(
            wish.objective_ms, self._settings.for_model(manifest.name)
        )
        settings = self._with(options)
        precision = settings.for_model(manifest.name).precision or settings.precision
        engines = await asyncio.to_thread(self._loader(settings).load, wish.package, manifest, precision)
        budget = self.total // len(self.slot_choices)
        try:
            self._precision = engines.active
            curve = await asyncio.to_thread(_curve, engines, manifest, self._requests)
            objective_s = wish.objective_ms / 1e3
            batches = batch_choices(curve, objective_s, slots)
            self._lone_s = min(self._lone_s, curve[min(curve)])
            self._guess = self._guess or 0.5 * slots * batches[0] / curve[batches[0]] / wish.rows
            executor = engines.executors[engines.active]
            exact = executor.exact_batch or manifest.batching.kind != "dynamic"
            buckets = [None] if exact else bucket_choices(batches[0], manifest.batching.buckets)
            if slots == self._first.slots:
                await self._try(self._first, engines)
                advance(1)
                budget -= 1
            at = replace(self._first, slots=slots, max_batch=batches[0], buckets=None)
            await self._try(at, engines)
            for row in range(4):
                choices = neighbours(at, batches, self._delays, buckets, self._sequences)[row]
                tried = [at, *choices]
                for candidate in choices:
                    await self._try(candidate, engines)
                    advance(1)
                    budget -= 1
                leader = best([self._measured[_key(c)] for c in tried])
                at = leader.candidate if leader is not None else at
        finally:
            await asyncio.to_thread(engines.close)
            advance(max(0, budget))

    async def _try(self, candidate: SettingsCandidate, engines: LoadedEngines) -> None:
        key = _key(candidate)
        if key not in self._measured:
            self._measured[key] = await self._measure(candidate, engines)

    async def _measure(self, candidate: SettingsCandidate, engines: LoadedEngines) -> Measured:
        async with self._running(candidate, engines) as (scheduler, counted):
            await self._offer(scheduler, self._guess, _WARM_UP_S, 0)
            sustained = await self._sustained(scheduler)
            if sustained:
                self._guess = sustained
                self._common = self._common or _COMMON * sustained
            if not self._common:
                return Measured(candidate, sustained)
            useful, computed = counted.elements()
            outcome = await self._offer(scheduler, self._common, self._wish.seconds, 99)
            after = counted.elements()
            padding = 1 - (after[0] - useful) / max(1, after[1] - computed)
            p50, p99 = (1e3 * outcome.quantile_s(share) for share in (0.5, 0.99))
            if p99 == float("inf"):
                return Measured(candidate, sustained)
            return Measured(candidate, sustained, p50, p99, padding)

    async def _sustained(self, scheduler: Scheduler) -> float:
        """The highest rate that is answered in time, to about 6 %."""
        low, high = 0.0, 0.0
        rate = self._guess
        for step in range(_MAX_STEPS):
            if await self._holds(scheduler, rate, step):
                low = rate
                rate *= _STEP
            else:
                high = rate
                rate /= _STEP * _STEP
            if (low and high) or rate * self._wish.seconds < _MIN_REQUESTS:
                break
        for step in range(_HALVINGS if low and high else 0):
            rate = (low * high) ** 0.5
            if await self._holds(scheduler, rate, _MAX_STEPS + step):
                low = rate
            else:
                high = rate
        return low

    async def _holds(self, scheduler: Scheduler, rate: float, seed: int) -> bool:
        """Whether the goal is met at a rate; a rate that misses it narrowly or by bad luck gets a second chance."""
        for chance in range(2):
            outcome = await self._offer(scheduler, rate, self._wish.seconds, 1000 * chance + seed)
            share = outcome.within(self._wish.objective_ms / 1e3)
            if share >= GOAL:
                return True
            if share < 1 - 5 * (1 - GOAL):
                return False
        return False

    async def _offer(self, scheduler: Scheduler, rate: float, seconds: float, seed: int) -> Outcome:
        wish = self._wish
        return await offer(scheduler, self._requests, wish.rows, rate, seconds, wish.seed * 10_000 + seed)

    @asynccontextmanager
    async def _running(
        self, candidate: SettingsCandidate, engines: LoadedEngines
    ) -> AsyncIterator[tuple[Scheduler, ModelMetrics]]:
        """A scheduler as the service would make it, with its precision monitor where there is one."""
        manifest = self._manifest
        own = candidate.settings(self._wish.objective_ms, self._settings.for_model(manifest.name))
        settings = self._with(own)
        options = model_settings(settings, manifest, self._runtime)
        metrics = ModelMetrics(manifest.name, str(manifest.version))
        device = shared_device(settings, self._runtime)
        scheduler, monitor = await start_scheduler(settings, options, manifest, engines, metrics, device)
        try:
            yield scheduler, metrics
        finally:
            if monitor is not None:
                await monitor.close(settings.drain_timeout_s)
            await scheduler.drain(settings.drain_timeout_s)


def _key(candidate: SettingsCandidate) -> str:
    return str(candidate.as_json())


def _curve(engines: LoadedEngines, manifest: Manifest, requests: Sequence[Arrays]) -> dict[int, float]:
    """Bucket → seconds of the active variant on one slot."""
    slot = engines.executors[engines.active].open_slot()
    batched = manifest.batching.kind != "none"
    sizes = manifest.batching.buckets or [manifest.max_batch]
    try:
        # The longest request: shorter ones take less.
        longest = max(requests, key=lambda inputs: sum(array.nbytes for array in inputs.values()))
        return measure_curve(slot, longest, sizes, seconds_per_bucket=0.05, least_runs=3, batched=batched)
    finally:
        slot.close()
