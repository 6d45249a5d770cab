"""A variant that becomes ready while its model is served: it takes traffic, and is watched from then on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from tests.support.packages import mlp_model, write_package
from tests.support.scheduling import until
from vernier.composition.engine import model_settings, start_scheduler
from vernier.engine.base import Executor
from vernier.engine.validated import ValidatedEngine
from vernier.exposition import Metrics
from vernier.metrics import ModelMetrics
from vernier.package.manifest import Manifest
from vernier.serving.models.loading import LoadedEngines, OnnxRuntimeLoader
from vernier.serving.models.repository import LoadedModel, Repository
from vernier.serving.monitoring.precision import PrecisionMonitor
from vernier.serving.queueing.sharing import DeviceScheduler
from vernier.serving.scheduling.scheduler import Scheduler
from vernier.settings import Settings

INSIDE, OUTSIDE = (np.full((1, 4), value, np.float32) for value in (0.5, 5.0))


class LateEngines(LoadedEngines):
    """Some variants are kept back until `arrive`, as those of TensorRT are whose plans are still being built."""

    def __init__(self, loaded: LoadedEngines, late: list[str]) -> None:
        here = {p: e for p, e in loaded.executors.items() if p not in late}
        super().__init__(here, min(here), golden=loaded.golden)
        self._late = {p: loaded.executors[p] for p in late}
        self._best = self.active
        self._arrived: Callable[[ValidatedEngine], None] | None = None

    def subscribe(self, arrived: Callable[[ValidatedEngine], None]) -> None:
        self._arrived = arrived

    def best(self) -> str:
        return self._best

    def arrive(self, precision: str, best: str, seconds: float = 1e-3) -> None:
        assert self._arrived is not None
        self._best = best
        self._arrived(ValidatedEngine(self._late[precision], {1: seconds}))

    def close(self) -> None:
        kept: list[Executor] = [*self.executors.values(), *self._late.values()]
        for executor in kept:
            executor.close()


class LateLoader:
    runtime = "onnxruntime"

    def __init__(self, late: list[str]) -> None:
        self._late = late

    def load(self, package: Path, manifest: Manifest, precision: str) -> LoadedEngines:
        return LateEngines(
            OnnxRuntimeLoader(lambda manifest: 1).load(package, manifest, precision), self._late
        )


@asynccontextmanager
async def serving(folder: Path, *late: str) -> AsyncIterator[LoadedModel]:
    """`clip` bends what int8 answers for inputs beyond 3; the golden vectors do not see it."""
    write_package(folder, variants={"int8": mlp_model(bend="clip")})
    settings = Settings(engines_dir=folder, monitor_share=1.0)

    async def start(
        manifest: Manifest, engines: LoadedEngines, metrics: ModelMetrics
    ) -> tuple[Scheduler, PrecisionMonitor | None]:
        options = model_settings(settings, manifest, "onnxruntime")
        return await start_scheduler(settings, options, manifest, engines, metrics, DeviceScheduler(2))

    metrics = Metrics(CollectorRegistry(), "0")
    repository = Repository(folder, LateLoader(list(late)), start, metrics, lambda name: "auto", 10.0)
    model = await repository.load("mlp")
    try:
        yield model
    finally:
        await repository.close()


async def answered_by(model: LoadedModel, x: np.ndarray) -> str:
    return (await model.scheduler.predict({"x": x}, rows=1)).precision


def late(model: LoadedModel) -> LateEngines:
    assert isinstance(model.engines, LateEngines)
    return model.engines


async def strays(model: LoadedModel) -> None:
    """Sends what int8 gets wrong until traffic is back at FP32."""
    for _ in range(2000):
        if await answered_by(model, OUTSIDE) == "fp32":
            return
    raise AssertionError("nobody watched")


async def test_a_variant_that_arrives_later_takes_traffic_and_falls_back_when_it_strays(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, "int8") as model:
        assert await answered_by(model, INSIDE) == "fp32"
        late(model).arrive("int8", best="int8")
        await until(lambda: model.precision == "int8")
        for _ in range(20):
            assert await answered_by(model, INSIDE) == "int8"
        await strays(model)


async def test_a_suspended_variant_is_not_taken_back_because_another_arrives(tmp_path: Path) -> None:
    async with serving(tmp_path, "int8") as model:
        late(model).arrive("int8", best="int8")
        await until(lambda: model.precision == "int8")
        await strays(model)
        late(model).arrive("int8", best="int8", seconds=2e-3)
        await until(lambda: model.engines.curves["int8"] == {1: 2e-3})
        for _ in range(50):
            assert await answered_by(model, INSIDE) == "fp32"


async def test_while_the_reference_is_missing_samples_are_dropped_and_when_it_arrives_they_are_judged(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, "fp32") as model:
        for _ in range(20):
            assert await answered_by(model, OUTSIDE) == "int8"
        late(model).arrive("fp32", best="int8")
        await until(lambda: "fp32" in model.executors)
        await strays(model)
