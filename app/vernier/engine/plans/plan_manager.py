"""The life of a package's plans on one GPU: find, verify, explain, rebuild, prove, measure, choose.

`start` loads what fits and returns; what does not fit is rebuilt from its variant, meanwhile the
safest variant that does fit serves. No engine is offered before it reproduced the golden vectors
within its budget on this very GPU. Threads, no event loop: callbacks come from the thread at work.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Set

from vernier.engine.base import default_buckets
from vernier.engine.cuda import Device
from vernier.engine.curve import measure_curve
from vernier.engine.plans.plan_source import Cancellation, PlanBuilder, PlanSource
from vernier.engine.selftest import self_test
from vernier.engine.trt_runtime.trt import TensorRtExecutor
from vernier.engine.trt_runtime.trt_api import TrtApi
from vernier.engine.validated import PlanEvent, ValidatedEngine, choose
from vernier.errors import DeviceFailed, EngineError, PackageError
from vernier.package.golden import golden_of
from vernier.package.manifest import PRECISIONS, Manifest, PlanEntry
from vernier.package.plan_cache import PlanCache
from vernier.package.plans import Target, unsupported

logger = logging.getLogger(__name__)

REBUILD_MODES = ("never", "background", "wait")

#: Slots besides the workers' that may be open at once: one for short batches on the event loop's own
#: thread, one for tests and the precision monitor.
SPARE_SLOTS = 2


#: One build at a time in this process: two on one GPU would spoil each other's timings.
_building = threading.Lock()


class PlanManager:
    """One package on one device. Thread-safe.

    Args:
        wanted: a precision, or `auto`.
        rebuild: one of REBUILD_MODES: whether plans that are missing or do not fit are built again, and
            whether `start` waits for that.
        slots: how many workers will have a slot of each variant; SPARE_SLOTS come on top.
        on_ready: called for each variant that becomes ready after `start` returned.
        on_event: called for everything worth a log line or a metric.
    """

    def __init__(
        self,
        package: Path,
        manifest: Manifest,
        *,
        api: TrtApi,
        device: Device,
        cache: PlanCache,
        builder: PlanBuilder,
        rebuild: str = "background",
        wanted: str = "auto",
        slots: int = 2,
        buckets: Optional[Sequence[int]] = None,
        on_ready: Optional[Callable[[ValidatedEngine], None]] = None,
        on_event: Optional[Callable[[PlanEvent], None]] = None,
    ) -> None:
        if rebuild not in REBUILD_MODES:
            raise ValueError(f"rebuild must be one of {', '.join(REBUILD_MODES)}")
        self._manifest = manifest
        self._api = api
        self._device = device
        self._cache = cache
        self._builder = builder
        self._rebuild = rebuild
        self._wanted = wanted
        self._slots = slots + SPARE_SLOTS
        self._buckets = buckets or manifest.batching.buckets or default_buckets(manifest.max_batch)
        self._on_ready = on_ready
        self._on_event = on_event
        self.target = Target(api.runtime, api.version, device.compute_capability, device.name)
        self._source = PlanSource(package, manifest, self.target, cache)
        self._golden = golden_of(package, manifest)
        self._lock = threading.Lock()
        self._ready: Dict[str, ValidatedEngine] = {}
        self._refused: Dict[str, str] = {}
        self._missing: List[str] = []
        self._tried: Set[str] = set()  # hashes of the plans that were found fitting
        self._cancellation = Cancellation()
        self._started = False
        self._thread: Optional[threading.Thread] = None

    # --- what others ask --------------------------------------------------------------------------
    @property
    def ready(self) -> Dict[str, ValidatedEngine]:
        """Precision → engine, of every variant that may take traffic."""
        with self._lock:
            return dict(self._ready)

    @property
    def refused(self) -> Dict[str, str]:
        """Precision → why it will not be served."""
        with self._lock:
            return dict(self._refused)

    @property
    def pending(self) -> List[str]:
        """The precisions that are still to be built."""
        with self._lock:
            return list(self._missing)

    def best(self) -> Optional[ValidatedEngine]:
        """The engine that new batches should take now; None while none is ready."""
        ready = self.ready
        name = choose(ready, self._wanted)
        return None if name is None else ready[name]

    # --- the way ----------------------------------------------------------------------------------
    def start(self) -> None:
        """Loads every plan that fits; builds the others as `rebuild` says. Blocks; call it once.

        Raises DeviceFailed when the GPU is lost.
        """
        for precision in sorted(self._manifest.variants, key=PRECISIONS.index):
            if not self._refuse_early(precision) and not self._load_fitting(precision):
                with self._lock:
                    self._missing.append(precision)
        if self._rebuild == "never" or not self._api.can_build:
            why = "VERNIER_REBUILD is never" if self._api.can_build else f"{self._api.runtime} cannot build"
            for precision in self.pending:
                self._refuse(precision, f"no {precision} plan fits this GPU, and {why}")
        elif self._rebuild == "wait":
            self._build_missing()
        elif self.pending:
            self._started = True
            self._thread = threading.Thread(
                target=self._build_in_background, name="vernier-plans", daemon=True
            )
            self._thread.start()
        self._started = True

    def close(self) -> None:
        """Ends a running build and closes every executor. Slots must be closed before. Idempotent."""
        self._cancellation.cancel()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            leaving, self._ready = list(self._ready.values()), {}
        for engine in leaving:
            engine.executor.close()

    def _refuse_early(self, precision: str) -> bool:
        """Refuses what this GPU cannot run, and what its gate on this runtime did not pass."""
        reason = unsupported(precision, self.target)
        gate = self._manifest.variants[precision].gates.get(self._api.runtime)
        if reason is None and gate is not None and not gate.passed:
            reason = f"its gate on {self._api.runtime} was not passed: {gate.reason}"
        if reason is not None:
            self._refuse(precision, reason)
        return reason is not None

    def _load_fitting(self, precision: str) -> bool:
        """True when the question is settled: a plan that fits is ready, or was refused for good."""
        try:
            entries, reasons = self._source.fitting(precision)
        except EngineError as error:
            self._refuse(precision, error.message)
            return True
        self._tried.update(entry.sha256 for entry in entries)
        for entry in entries:
            try:
                executor = self._open(precision, self._source.read(entry))
            except DeviceFailed:
                raise
            except (EngineError, PackageError) as error:
                reasons.append(error.message)
                continue
            if executor.max_slots is not None and executor.max_slots < self._slots:
                reasons.append(
                    f"plan '{entry.path}' has {executor.max_slots} optimization profile(s), but "
                    f"{self._slots} slots are wanted"
                )
                executor.close()
                continue
            self._prove(precision, executor, entry)
            return True
        for reason in reasons:
            self._tell(PlanEvent("mismatch", precision, reason))
        return False

    def _open(self, precision: str, plan: bytes) -> TensorRtExecutor:
        return TensorRtExecutor(
            plan,
            api=self._api,
            device=self._device,
            precision=precision,
            inputs=self._manifest.input_specs(),
            outputs=self._manifest.output_specs(),
            runtime_cache=self._cache.kernels(self.target, precision),
        )

    def _prove(self, precision: str, executor: TensorRtExecutor, entry: PlanEntry) -> None:
        """Self-test, then the latency curve; ready or refused afterwards."""
        try:
            reason = None
            if self._golden is not None:
                limits = self._manifest.variants[precision].budget
                reason = self_test(executor, self._golden, limits, self._manifest.max_batch)
            if reason is not None:
                executor.close()
                self._refuse(precision, reason, self_test=True)
                return
            curve = self._curve(executor, entry)
        except BaseException:
            executor.close()
            raise
        engine = ValidatedEngine(executor, curve)
        with self._lock:
            self._ready[precision] = engine
            if precision in self._missing:
                self._missing.remove(precision)
        self._tell(PlanEvent("ready", precision))
        if self._started and self._on_ready is not None:
            self._on_ready(engine)

    def _curve(self, executor: TensorRtExecutor, entry: PlanEntry) -> Dict[int, float]:
        known = self._cache.curve(entry.sha256, self._device.name) if self._trusts_cache() else None
        if known is not None and set(known) >= set(self._buckets):
            return known
        if self._golden is None:
            return {}
        slot = executor.open_slot()
        try:
            curve = measure_curve(
                slot, self._golden.inputs, self._buckets, batched=self._manifest.batching.kind != "none"
            )
        finally:
            slot.close()
        try:
            self._cache.save_curve(entry.sha256, self._device.name, curve)
        except (OSError, PackageError) as error:
            logger.warning("the latency curve of %s is not kept: %s", executor.precision, error)
        return curve

    def _trusts_cache(self) -> bool:
        try:
            self._cache.plans()
        except PackageError:
            return False
        return True

    # --- rebuilding -------------------------------------------------------------------------------
    def _build_in_background(self) -> None:
        try:
            self._build_missing()
        except DeviceFailed as error:
            for precision in self.pending:
                self._refuse(precision, error.message)

    def _build_missing(self) -> None:
        """Builds one after the other, the ones that are needed soonest first."""
        while not self._cancellation.cancelled:
            pending = self.pending
            if not pending:
                return
            self._build(self._next(pending))

    def _next(self, pending: Sequence[str]) -> str:
        """While nothing is ready the safest; then what is wanted or was decided at build time; then the rest."""
        if not self.ready:
            return min(pending, key=PRECISIONS.index)
        wanted = self._wanted
        if wanted == "auto":
            wanted = self._manifest.decision.get(self._api.runtime, "")
        return wanted if wanted in pending else pending[0]

    def _build(self, precision: str) -> None:
        try:
            self._prepare_cache()
            with self._turn():
                if self._built_meanwhile(precision):
                    return
                self._tell(PlanEvent("rebuilding", precision))
                request = self._source.request(precision, self._slots, self._device.index, self._cancellation)
                data = self._builder(request)
                entry = self._store(precision, data)
            executor = self._open(precision, data)
        except DeviceFailed:
            raise
        except (EngineError, PackageError) as error:
            self._refuse(precision, f"its plan could not be rebuilt: {error.message}")
            return
        self._tell(PlanEvent("rebuilt", precision))
        self._prove(precision, executor, entry)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One plan is built at a time, in this process and for this package in all."""
        while not _building.acquire(timeout=1.0):
            self._require_wanted()
        try:
            with self._cache.build_turn(self._wait):
                yield
        finally:
            _building.release()

    def _wait(self) -> None:
        self._require_wanted()
        time.sleep(0.2)

    def _require_wanted(self) -> None:
        if self._cancellation.cancelled:
            raise EngineError("it was unloaded before its turn came")

    def _built_meanwhile(self, precision: str) -> bool:
        """Whether another GPU of this kind has had the plan built while this one waited for its turn."""
        found = {entry.sha256 for entry in self._source.fitting(precision)[0]}
        return not found <= self._tried and self._load_fitting(precision)

    def _prepare_cache(self) -> None:
        try:
            self._cache.prepare()
        except (OSError, PackageError) as error:
            logger.warning("rebuilt plans are not kept: %s", error)

    def _store(self, precision: str, data: bytes) -> PlanEntry:
        """Keeps the plan where that is possible; an entry in any case."""
        try:
            return self._source.store(precision, data)
        except (OSError, PackageError) as error:
            logger.warning("the rebuilt %s plan is not kept: %s", precision, error)
            return self._source.entry(precision, data)

    # --- telling ----------------------------------------------------------------------------------
    def _refuse(self, precision: str, reason: str, self_test: bool = False) -> None:
        with self._lock:
            self._refused[precision] = reason
            if precision in self._missing:
                self._missing.remove(precision)
        self._tell(PlanEvent("refused", precision, reason, self_test))

    def _tell(self, event: PlanEvent) -> None:
        level = logging.WARNING if event.kind in ("mismatch", "refused") else logging.INFO
        model = {
            "model": self._manifest.name,
            "version": self._manifest.version,
            "precision": event.precision,
            "device": repr(self._device),
        }
        logger.log(level, "plan %s", event.kind, extra={**model, "reason": event.reason})
        if self._on_event is not None:
            self._on_event(event)
