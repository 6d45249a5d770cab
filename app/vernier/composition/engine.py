"""The engine side: loaders, schedulers, monitors and the repository, wired from the settings."""

from __future__ import annotations

import logging
import time

from prometheus_client import CollectorRegistry

from vernier.accuracy import spread_of
from vernier.cores import available_cores
from vernier.engine.nvml import GpuCollector, Nvml
from vernier.engine.plans.plan_source import BuilderProcess
from vernier.engine.validated import PlanEvent
from vernier.errors import EngineError
from vernier.exposition import Metrics
from vernier.metrics import ModelMetrics
from vernier.package.manifest import Manifest
from vernier.package.plan_cache import PlanCache, cache_folder
from vernier.serving.lifecycle import Lifecycle
from vernier.serving.models.loading import EngineLoader, LoadedEngines, OnnxRuntimeLoader, expected_curves
from vernier.serving.models.loading_tensorrt import TensorRtLoader, find_tensorrt
from vernier.serving.models.repository import Repository
from vernier.serving.models.watch import watch
from vernier.serving.monitoring.precision import REFERENCE, LiveBudget, MonitorOptions, PrecisionMonitor
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.queueing.sharing import DeviceScheduler
from vernier.serving.scheduling.scheduler import Policy, Scheduler
from vernier.settings import ModelSettings, Settings, SettingsError

logger = logging.getLogger("vernier")

#: Two slots overlap copies with compute; three give some throughput for more latency (benchmarks/GPU.md).
DEFAULT_GPU_SLOTS = 2


def create_repository(
    settings: Settings, metrics: Metrics, registry: CollectorRegistry, *, at_once: bool = True
) -> Repository:
    """The repository of the models in the engines folder, nothing loaded yet. Raises SettingsError.

    Args:
        at_once: see Scheduler.
    """

    async def start_model(
        manifest: Manifest, engines: LoadedEngines, counted: ModelMetrics
    ) -> tuple[Scheduler, PrecisionMonitor | None]:
        options = model_settings(settings, manifest, loader.runtime)
        return await start_scheduler(settings, options, manifest, engines, counted, device, at_once)

    def precision_of(name: str) -> str:
        return settings.for_model(name).precision or settings.precision

    loader = make_loader(settings, metrics, registry)
    device = shared_device(settings, loader.runtime)
    return Repository(
        settings.engines_dir,
        loader,
        start_model,
        metrics,
        precision_of,
        settings.drain_timeout_s,
    )


def shared_device(settings: Settings, runtime: str) -> DeviceScheduler:
    """What the models share: as many executions at once as the machine is good for, or as one model asks for."""
    on_cpu = runtime == OnnxRuntimeLoader.runtime
    asked = [settings.slots or 1, *(model.slots or 1 for model in settings.models.values())]
    at_once = max(engine_cores(settings) if on_cpu else DEFAULT_GPU_SLOTS, *asked)
    return DeviceScheduler(at_once * (1 if on_cpu else len(settings.devices)))


def make_loader(settings: Settings, metrics: Metrics, registry: CollectorRegistry) -> EngineLoader:
    """TensorRT where there is a GPU (or where it is asked for), else ONNX Runtime. Raises SettingsError."""
    if settings.runtime != "onnxruntime":
        try:
            found = find_tensorrt(settings.runtime, settings.devices)
        except EngineError as error:
            named = ",".join(map(str, settings.devices))
            raise SettingsError(
                f"VERNIER_RUNTIME is {settings.runtime} and VERNIER_DEVICES {named}: {error.message}"
            ) from error
        if found is not None:
            api, devices = found
            registry.register(GpuCollector(Nvml([device.pci_bus_id for device in devices])))
            return TensorRtLoader(
                api,
                devices,
                BuilderProcess(),
                lambda m: PlanCache(
                    cache_folder(settings.engines_dir, settings.cache_dir, m.name, m.version)
                ),
                lambda m: model_settings(settings, m, api.runtime).slots or DEFAULT_GPU_SLOTS,
                settings.rebuild,
                lambda m, event: count_plan_event(metrics, m, event),
            )
    return OnnxRuntimeLoader(
        lambda m: threads_per_slot(
            model_settings(settings, m, OnnxRuntimeLoader.runtime), engine_cores(settings)
        )
    )


def engine_cores(settings: Settings) -> int:
    """Cores that one engine process may use: several share all of them."""
    return max(1, available_cores() // (settings.engine_processes or 1))


def threads_per_slot(options: ModelSettings, cores: int) -> int:
    """Cores that one execution on the CPU may use: the model's slots share all that the process may use."""
    return max(1, cores // (options.slots or cores))


def count_plan_event(metrics: Metrics, manifest: Manifest, event: PlanEvent) -> None:
    """A variant that fails its self-test on this GPU is a fallback before it has served."""
    if event.kind == "refused" and event.self_test:
        metrics.package_refused(manifest.name, str(manifest.version), f"self_test:{event.precision}")


def model_settings(settings: Settings, manifest: Manifest, runtime: str) -> ModelSettings:
    """The model's own settings before the package's `serve` section before the service's."""
    slots = engine_cores(settings) if runtime == OnnxRuntimeLoader.runtime else DEFAULT_GPU_SLOTS
    own = settings.for_model(manifest.name).model_dump(exclude_none=True)
    packaged = ModelSettings.model_validate(manifest.serve).model_dump(exclude_none=True)
    general = settings.model_dump(include=set(ModelSettings.model_fields), exclude_none=True)
    return ModelSettings.model_validate({"slots": slots, **general, **packaged, **own})


def batch_layout(manifest: Manifest, options: ModelSettings) -> BatchLayout:
    """The shapes of the model's batches. Raises SettingsError for buckets that the package has no room for."""
    name = manifest.name
    if options.buckets and manifest.batching.kind != "dynamic":
        raise SettingsError(f"models.{name}.buckets is set, but the package's batch is fixed; take it out")
    if options.buckets and options.buckets[-1] > manifest.max_batch:
        raise SettingsError(
            f"models.{name}.buckets goes up to {options.buckets[-1]}, but the package takes batches up to "
            f"{manifest.max_batch}; lower it, or build with --max-batch {options.buckets[-1]}"
        )
    padded = {rule.dim for rule in manifest.sequence}
    for dim, sizes in (options.sequence_buckets or {}).items():
        if dim not in padded:
            raise SettingsError(
                f"models.{name}.sequence_buckets names '{dim}', but the package pads "
                f"{', '.join(sorted(padded)) or 'no dimension'}"
            )
        low, high = manifest.input_dims()[dim]
        if not low <= sizes[0] <= sizes[-1] <= high:
            raise SettingsError(f"models.{name}.sequence_buckets.{dim} must lie in {low} to {high}")
    return BatchLayout.of(manifest, options.max_batch, options.buckets, options.sequence_buckets)


async def start_scheduler(
    settings: Settings,
    options: ModelSettings,
    manifest: Manifest,
    engines: LoadedEngines,
    metrics: ModelMetrics,
    device: DeviceScheduler,
    at_once: bool = True,
) -> tuple[Scheduler, PrecisionMonitor | None]:
    """Opens a model's slots, measures them, and puts the precision monitor behind its answers."""
    objective_ms = options.latency_objective_ms
    policy = Policy(
        max_queue_delay_s=(options.max_queue_delay_ms or 0.0) / 1e3,
        objective_s=None if objective_ms is None else objective_ms / 1e3,
        queue_limit=options.queue_limit or settings.queue_limit,
    )
    scheduler = Scheduler(
        manifest.name,
        batch_layout(manifest, options),
        engines.executors,
        engines.active,
        policy,
        (options.slots or 1) * max(len(executor.parts) for executor in engines.executors.values()),
        metrics,
        curves=expected_curves(manifest, engines),
        device=device,
        clock=time.monotonic,
        at_once=at_once,
    )
    try:
        await scheduler.started()
    except BaseException:
        await scheduler.drain(settings.drain_timeout_s)
        raise
    if settings.monitor_share == 0 or set(manifest.variants) - set(engines.refused) <= {REFERENCE}:
        return scheduler, None
    golden = engines.golden.outputs if engines.golden else {}
    spreads = {name: spread_of(array) for name, array in golden.items()}
    monitor = PrecisionMonitor(
        manifest.name,
        engines.executors,
        {p: LiveBudget(variant.budget, spreads) for p, variant in manifest.variants.items()},
        lambda: scheduler.precision,
        scheduler.set_precision,
        metrics,
        MonitorOptions(settings.monitor_cool_down_s),
    )
    scheduler.set_tap(monitor.tap, settings.monitor_share, settings.monitor_quiet_s)
    return scheduler, monitor


async def start(repository: Repository, lifecycle: Lifecycle, settings: Settings) -> None:
    """Loads the packages, then those that appear while the service runs; readiness tells how far it is."""
    await repository.load_all()
    lifecycle.started()
    reason = repository.not_ready_reason()
    if reason is None:
        logger.info("ready", extra={"models": len(repository.models())})
    else:
        logger.error("not ready", extra={"reason": reason})
    await watch(repository, settings.watch_s)
