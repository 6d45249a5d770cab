"""What is measured on a GPU: the raw engine (the limit), one slot, and the pool. Python 3.9, no onnx."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from vernier.builder.plans.plan import PlanOptions, build_plan
from vernier.engine.base import Slot
from vernier.engine.cuda import Device, Graph, open_device
from vernier.engine.curve import repeat_rows
from vernier.engine.trt_runtime.trt import MAPPED_BYTES, TensorRtExecutor
from vernier.engine.trt_runtime.trt_api import TrtApi, load_api
from vernier.package.golden import GoldenVectors, load_golden
from vernier.package.integrity import open_package
from vernier.package.manifest import DimRange, Manifest
from vernier.package.plans import Target, variant_files
from vernier.tensors import Arrays


@dataclass(frozen=True)
class Bench:
    """One package on one device; plans are built on first use, with one timing cache for all."""

    package: Path
    manifest: Manifest
    golden: GoldenVectors
    api: TrtApi
    device: Device
    work: Path

    @classmethod
    def open(cls, package: Path, work: Path, gpu: int = 0) -> Bench:
        manifest = open_package(package)
        golden = load_golden(package / "golden.npz")
        return cls(package, manifest, golden, load_api("tensorrt"), open_device(gpu), work)

    @property
    def target(self) -> Target:
        return Target(self.api.runtime, self.api.version, self.device.compute_capability, self.device.name)

    def plan(self, precision: str, profiles: int, batch: Optional[int] = None) -> Tuple[bytes, float]:
        """The plan and the seconds it took to build; `batch` makes one for that batch alone."""
        dims = dict(self.manifest.dims)
        if batch is not None:
            dims["batch"] = DimRange(min=batch, opt=batch, max=batch)
        model = self.package / variant_files(self.manifest.variants[precision], self.target)[0]
        options = PlanOptions(
            "tensorrt",
            precision,
            dims,
            profiles,
            timing_cache=self.work / f"{self.manifest.name}.timing",
            own_timing_cache=True,
        )
        started = perf_counter()
        plan = build_plan(model, self.manifest.input_specs(), options).data
        return plan, perf_counter() - started

    def executor(self, plan: bytes, precision: str, **changes: Any) -> TensorRtExecutor:
        return TensorRtExecutor(
            plan,
            api=self.api,
            device=self.device,
            precision=precision,
            inputs=self.manifest.input_specs(),
            outputs=self.manifest.output_specs(),
            **changes,
        )

    def inputs(self, rows: int) -> Arrays:
        return repeat_rows(self.golden.inputs, rows)


def percentiles(times: Sequence[float]) -> Dict[str, float]:
    ordered = np.sort(np.asarray(times))
    return {
        "p50": float(np.quantile(ordered, 0.5)),
        "p99": float(np.quantile(ordered, 0.99)),
        "runs": len(ordered),
    }


def timed(call: Callable[[], object], seconds: float, least: int = 20) -> List[float]:
    """Wall seconds of each call, for about `seconds`."""
    times: List[float] = []
    end = perf_counter() + seconds
    while len(times) < least or perf_counter() < end:
        started = perf_counter()
        call()
        times.append(perf_counter() - started)
    return times


# --- the raw engine -------------------------------------------------------------------------------
class RawEngine:
    """The engine alone: its inputs lie on the GPU, its outputs stay there. Uses the plan's last profile."""

    def __init__(self, executor: TensorRtExecutor, inputs: Arrays) -> None:
        self._device = executor.cuda
        self._memory: List[Any] = []
        with self._device:
            self._context = executor.engine.create_execution_context()
            self._stream = self._device.make_stream()
            if executor.max_slots is not None:
                self._context.set_optimization_profile_async(executor.max_slots - 1, self._stream.handle)
                self._stream.wait(spin=False)
            for name, array in inputs.items():
                narrow = array.astype(executor.plan_dtypes[name], copy=False)
                staging = self._device.allocate_staging(narrow.nbytes)
                staging.host[: narrow.nbytes] = np.ascontiguousarray(narrow).reshape(-1).view(np.uint8)
                staging.upload(self._stream, narrow.nbytes)
                self._context.set_input_shape(name, array.shape)
                self._context.set_tensor_address(name, staging.address)
                self._memory.append(staging)
            for name in executor.output_names:
                size = (
                    int(np.prod(self._context.get_tensor_shape(name))) * executor.plan_dtypes[name].itemsize
                )
                memory = self._device.allocate(size)
                self._context.set_tensor_address(name, memory.address)
                self._memory.append(memory)
            for _ in range(2):
                self.enqueue()
                self._stream.wait(spin=False)
            self._graph = Graph(self._device, self._stream, self.enqueue)

    def enqueue(self) -> None:
        assert self._context.execute_async_v3(self._stream.handle)

    def seconds(self, duration: float) -> Tuple[float, float]:
        """(one launch waited for, median; a launch among many in a row) of the graph."""
        with self._device:

            def once() -> None:
                self._graph.launch()
                self._stream.wait(spin=True)

            for _ in range(3):
                once()
            alone = median(timed(once, duration / 2))
            count = max(10, int(duration / 2 / alone))
            best = float("inf")
            for _ in range(3):
                started = perf_counter()
                for _ in range(count):
                    self._graph.launch()
                self._stream.wait(spin=True)
                best = min(best, (perf_counter() - started) / count)
        return alone, best

    def layers(self, runs: int = 20) -> Dict[str, float]:
        """Layer → median milliseconds, by TensorRT's profiler (which adds some time of its own)."""
        trt = load_api("tensorrt").module
        found: Dict[str, List[float]] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                found.setdefault(layer_name, []).append(ms)

        with self._device:
            self._context.profiler = Profiler()
            for _ in range(runs):
                self.enqueue()
                self._stream.wait(spin=True)
        return {name: median(times) for name, times in found.items()}

    def close(self) -> None:
        with self._device:
            self._graph.free()
            self._context = None
            for memory in self._memory:
                memory.free()
            self._stream.free()


# --- one slot -------------------------------------------------------------------------------------
def stage(slot: Slot, inputs: Arrays) -> None:
    views = slot.stage({name: array.shape for name, array in inputs.items()})
    for name, array in inputs.items():
        views[name][...] = array


def round_trip(slot: Slot, inputs: Arrays, seconds: float, filled: bool) -> Dict[str, float]:
    """Percentiles of one execution, copies to and from the GPU included.

    filled: the copy of the caller's arrays into the slot's memory is part of the time too.
    """
    stage(slot, inputs)
    for _ in range(5):
        slot.run()

    def once() -> None:
        if filled:
            stage(slot, inputs)
        slot.run()

    return percentiles(timed(once, seconds))


# --- the pool -------------------------------------------------------------------------------------
def pool_throughput(
    executors: Sequence[TensorRtExecutor], inputs: Arrays, slots: int, seconds: float, filled: bool
) -> Dict[str, float]:
    """Executions per second of `slots` threads with a slot each, and the percentiles of one execution.

    executors: of the same plan, one on each GPU; the threads take them in turn.
    """
    ready, go = threading.Barrier(slots + 1), threading.Event()
    stop = threading.Event()
    ends: List[List[Tuple[float, float]]] = [[] for _ in range(slots)]
    failures: List[BaseException] = []

    def work(number: int) -> None:
        try:
            slot = executors[number % len(executors)].open_slot()
            own = {name: array.copy() for name, array in inputs.items()}
            stage(slot, own)
            for _ in range(5):
                slot.run()
            ready.wait()
            go.wait()
            while not stop.is_set():
                started = perf_counter()
                if filled:
                    stage(slot, own)
                slot.run()
                ended = perf_counter()
                ends[number].append((ended, ended - started))
            slot.close()
        except BaseException as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(slots)]
    for thread in threads:
        thread.start()
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        raise failures[0] from None
    go.set()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    # Between the first and the last execution that ended while every slot was busy: neither the start,
    # when the slots are in step, nor the end, when they run dry, is what a loaded service sees.
    begin = max(part[min(2, len(part) - 1)][0] for part in ends)
    end = min(part[-1][0] for part in ends)
    counted = [(at, took) for part in ends for at, took in part if begin < at <= end]
    if len(counted) < slots:
        raise RuntimeError(f"{seconds} s are too short for executions this long")
    rate = len(counted) / (end - begin)
    return {"per_s": rate, "slots": slots, **percentiles([took for _, took in counted])}


def relative_error(bench: Bench, executor: TensorRtExecutor) -> Dict[str, float]:
    """Against ONNX Runtime's FP32 on the golden vectors: relative L2 and largest absolute error."""
    slot = executor.open_slot()
    stage(slot, bench.golden.inputs)
    found = {name: array.copy() for name, array in slot.run().items()}
    slot.close()
    worst = {"rel_l2": 0.0, "max_abs": 0.0}
    for name, expected in bench.golden.outputs.items():
        difference = found[name].astype(np.float64) - expected
        worst["rel_l2"] = max(worst["rel_l2"], float(np.linalg.norm(difference) / np.linalg.norm(expected)))
        worst["max_abs"] = max(worst["max_abs"], float(np.abs(difference).max()))
    return worst


__all__ = ["MAPPED_BYTES", "Bench", "RawEngine", "pool_throughput", "relative_error", "round_trip"]
