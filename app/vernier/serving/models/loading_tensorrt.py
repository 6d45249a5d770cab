"""TensorRT engines for the repository: what fits now is served, what is rebuilt joins later."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from vernier.engine.cuda import Device, count_devices, open_device
from vernier.engine.plans.plan_group import PlanGroup, Plans
from vernier.engine.plans.plan_manager import PlanManager
from vernier.engine.plans.plan_source import PlanBuilder
from vernier.engine.trt_runtime.trt_api import RUNTIMES, TrtApi, load_api
from vernier.engine.validated import PlanEvent, ValidatedEngine
from vernier.errors import EngineError
from vernier.package.golden import golden_of
from vernier.package.manifest import Manifest
from vernier.package.plan_cache import PlanCache
from vernier.serving.models.loading import LoadedEngines

logger = logging.getLogger(__name__)


def find_tensorrt(wanted: str, indices: Sequence[int]) -> tuple[TrtApi, list[Device]] | None:
    """The TensorRT package and the GPUs to serve with; None for `auto` on a machine without them.

    Args:
        wanted: `auto`, or one of the TensorRT runtimes.
        indices: CUDA's numbers of the GPUs.

    Raises:
        EngineError: a runtime was named and cannot run here; or there are GPUs, but not all of those named.
    """
    try:
        count_devices()
    except EngineError:
        if wanted == "auto":
            return None
        raise
    problems = []
    for runtime in RUNTIMES if wanted == "auto" else (wanted,):
        try:
            api = load_api(runtime)
        except EngineError as error:
            problems.append(error.message)
        else:
            return api, [open_device(index) for index in indices]
    if wanted == "auto":
        logger.warning("a GPU is here, but no TensorRT: %s", "; ".join(problems))
        return None
    raise EngineError("; ".join(problems))


class _Arrivals:
    """Engines that become ready: the first ones are waited for, later ones go to a subscriber."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._early: list[ValidatedEngine] = []
        self._subscriber: Callable[[ValidatedEngine], None] | None = None
        self.something = threading.Event()

    def arrived(self, engine: ValidatedEngine) -> None:
        with self._lock:
            if self._subscriber is None:
                self._early.append(engine)
            else:
                self._subscriber(engine)
        self.something.set()

    def taken(self, precisions: Sequence[str]) -> None:
        """Forgets early arrivals that the caller has seen already."""
        with self._lock:
            self._early = [e for e in self._early if e.executor.precision not in precisions]

    def subscribe(self, subscriber: Callable[[ValidatedEngine], None]) -> None:
        with self._lock:
            for engine in self._early:
                subscriber(engine)
            self._early.clear()
            self._subscriber = subscriber


class TensorRtEngines(LoadedEngines):
    """The engines of one package on the GPUs at hand."""

    def __init__(self, manager: Plans, arrivals: _Arrivals, package: Path, manifest: Manifest) -> None:
        golden = golden_of(package, manifest)
        ready = manager.ready
        best = manager.best()
        assert best is not None
        super().__init__(
            {precision: engine.executor for precision, engine in ready.items()},
            best.executor.precision,
            manager.refused,
            golden,
            {precision: dict(engine.curve) for precision, engine in ready.items()},
        )
        arrivals.taken(list(ready))
        self._manager = manager
        self._arrivals = arrivals

    def subscribe(self, arrived: Callable[[ValidatedEngine], None]) -> None:
        self._arrivals.subscribe(arrived)

    def best(self) -> str:
        found = self._manager.best()
        return self.active if found is None else found.executor.precision

    def close(self) -> None:
        self._manager.close()


class TensorRtLoader:
    """One TensorRT package on one or several GPUs.

    Args:
        devices: the GPUs; each variant is loaded on all of them.
        builder: builds plans that are missing, in a process of its own.
        cache_of: where plans built on this machine are kept.
        slots_of: how many slots a model will have on each GPU.
        on_event: called for every plan event, from any thread, with the manifest.
    """

    def __init__(
        self,
        api: TrtApi,
        devices: Sequence[Device],
        builder: PlanBuilder,
        cache_of: Callable[[Manifest], PlanCache],
        slots_of: Callable[[Manifest], int],
        rebuild: str,
        on_event: Callable[[Manifest, PlanEvent], None],
    ) -> None:
        self.runtime = api.runtime
        self._api = api
        self._devices = devices
        self._builder = builder
        self._cache_of = cache_of
        self._slots_of = slots_of
        self._rebuild = rebuild
        self._on_event = on_event

    def load(self, package: Path, manifest: Manifest, precision: str) -> LoadedEngines:
        arrivals = _Arrivals()

        def on_event(event: PlanEvent) -> None:
            self._on_event(manifest, event)
            if event.kind == "refused":
                arrivals.something.set()

        def plans_of(index: int, on_ready: Callable[[ValidatedEngine], None]) -> Plans:
            return PlanManager(
                package,
                manifest,
                api=self._api,
                device=self._devices[index],
                cache=self._cache_of(manifest),
                builder=self._builder,
                rebuild=self._rebuild,
                wanted=precision,
                slots=self._slots_of(manifest),
                on_ready=on_ready,
                on_event=on_event,
            )

        manager: Plans
        if len(self._devices) == 1:
            manager = plans_of(0, arrivals.arrived)
        else:
            manager = PlanGroup(plans_of, len(self._devices), precision, arrivals.arrived)
        try:
            manager.start()
            while not manager.ready and manager.pending:
                arrivals.something.wait()  # nothing fits: the first rebuilt variant is waited for
                arrivals.something.clear()
            if not manager.ready:
                reasons = "; ".join(f"{p}: {r}" for p, r in manager.refused.items())
                raise EngineError(
                    f"no variant of {manifest.name} can be served on {self._devices[0].name}: {reasons}"
                )
            return TensorRtEngines(manager, arrivals, package, manifest)
        except BaseException:
            manager.close()
            raise
