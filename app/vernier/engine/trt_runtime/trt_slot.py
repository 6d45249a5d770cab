"""One execution context with its stream, its staging memory and its CUDA graphs.

The first two runs of a set of shapes go call by call: the first warms up, the second is timed by
stage. Then upload, execution and download are captured as one graph, and every later run of these
shapes is a single launch. What cannot be captured keeps running call by call, and is counted.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ContextManager, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

import numpy as np

from vernier.engine.base import ConflictGuard, Slot, StageTimes
from vernier.engine.cuda import Device, Graph, Staging, Timeline
from vernier.engine.layout import Layout, pack
from vernier.engine.trt_runtime.trt_api import TrtApi
from vernier.engine.trt_runtime.trt_outputs import DynamicOutputAllocator
from vernier.errors import DeviceFailed, EngineError
from vernier.tensors import Array, Arrays, shape_text

logger = logging.getLogger(__name__)

Shapes = Tuple[Tuple[int, ...], ...]
#: The smallest, the typical and the largest shape that a plan takes for an input.
Limits = Tuple[Tuple[int, ...], Tuple[int, ...], Tuple[int, ...]]

#: Shorter executions carry no event nodes in their graph: four cost some microseconds.
TIMED_FROM_S = 250e-6

#: Shorter executions are waited for by spinning. On an H200 that gave 3 to 9 % more throughput at 1.3 to
#: 4 ms an execution than waiting for the driver's interrupt, for a core that is busy meanwhile.
SPIN_BELOW_S = 5e-3

#: Sets of shapes whose graphs one slot keeps; the one unused for longest leaves first.
MAX_BINDINGS = 64


@dataclass
class Binding:
    """One set of input shapes: where its tensors lie, and its graph once there is one.

    casts: inputs whose staging type is wider than the plan's: (name, what the caller writes, what is sent).
    shares: parts of upload and compute in the time of an execution, as last measured by events.
    """

    shapes: Shapes
    inputs: Layout
    outputs: Layout
    staging_in: Staging
    staging_out: Staging
    views: Arrays
    results: Arrays
    casts: List[Tuple[str, Array, Array]]
    runs: int = 0
    seconds: float = 0.0
    shares: Tuple[float, float] = (0.0, 1.0)
    timed: bool = False
    graph: Optional[Graph] = None
    capturable: bool = True


class SlotOwner(Protocol):
    """What a slot uses of the executor that opened it; see `TensorRtExecutor`."""

    precision: str
    device: str
    api: TrtApi
    cuda: Device
    input_names: Sequence[str]
    output_names: Sequence[str]
    host_dtypes: Dict[str, np.dtype[Any]]
    plan_dtypes: Dict[str, np.dtype[Any]]
    cast_outputs: bool
    limits: Dict[str, Limits]
    use_graphs: bool
    mapped_bytes: int
    serial: ContextManager[Any]

    def slot_closed(self, slot: "TensorRtSlot") -> None: ...


class TensorRtSlot(Slot):
    """See `vernier.engine.base.Slot`. Made by `TensorRtExecutor.open_slot`.

    Attributes:
        graph_launches, plain_launches: executions so far, by graph and call by call.
    """

    def __init__(self, owner: SlotOwner, profile: int, context: Any) -> None:
        self._owner = owner
        self._device = owner.cuda
        self.profile = profile
        self._context: Any = context
        self._guard = ConflictGuard(f"a slot of {owner.precision} on {owner.device}")
        self._bindings: OrderedDict[Shapes, Binding] = OrderedDict()
        self._staged: Optional[Binding] = None
        self._applied: Optional[Binding] = None
        self._times: Optional[StageTimes] = StageTimes()
        self._last: Tuple[float, Tuple[float, float]] = (0.0, (0.0, 1.0))
        self._closed = False
        self.graph_launches = 0
        self.plain_launches = 0
        self._pools: List[Tuple[Staging, Staging]] = []
        self._growing = DynamicOutputAllocator(self._device, owner.api, [])
        self._stream = self._device.make_stream()
        self._timeline = Timeline(self._device)
        try:
            self._prepare()
        except BaseException:
            self._free_memory()
            raise

    def _prepare(self) -> None:
        """Takes the profile, and staging memory for the largest batch that it allows."""
        owner = self._owner
        if owner.api.below_10 and not self._context.set_optimization_profile_async(
            self.profile, self._stream.handle
        ):
            raise EngineError(f"profile {self.profile} of the plan is taken; {owner.api.messages.tail()}")
        sizes, output_shapes = self._largest()
        unknown = [name for name, shape in output_shapes.items() if min(shape, default=0) < 0]
        if unknown and owner.api.below_10:
            # Seen on a GPU with 8.5.1: the shape reported may be that of the run before, and memory is
            # asked for accordingly.
            raise EngineError(
                f"only the run itself tells the shape of output '{unknown[0]}', and TensorRT "
                f"{owner.api.version} tells it unreliably: serve this model with TensorRT 10 or onnxruntime"
            )
        self._growing = DynamicOutputAllocator(self._device, owner.api, unknown)
        self._fixed = [name for name in owner.output_names if name not in unknown]
        fixed_shapes = {name: output_shapes[name] for name in self._fixed}
        if owner.mapped_bytes:
            self._add_pool(owner.mapped_bytes, owner.mapped_bytes, mapped=True)
        in_size = pack(owner.input_names, owner.plan_dtypes, sizes).size
        self._add_pool(in_size, pack(self._fixed, owner.plan_dtypes, fixed_shapes).size, mapped=False)

    def _add_pool(self, in_size: int, out_size: int, mapped: bool) -> None:
        staging_in = self._device.allocate_staging(in_size, mapped)
        try:
            self._pools.append((staging_in, self._device.allocate_staging(out_size, mapped)))
        except BaseException:
            staging_in.free()
            raise

    def _largest(self) -> Tuple[Dict[str, Tuple[int, ...]], Dict[str, Tuple[int, ...]]]:
        """The largest inputs of the profile, and the outputs they give (−1 where only a run can tell)."""
        sizes = {name: self._owner.limits[name][2] for name in self._owner.input_names}
        with self._owner.serial:
            self._set_shapes(tuple(sizes.values()))
            outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in self._owner.output_names}
        return sizes, outputs

    # --- staging ----------------------------------------------------------------------------------
    def stage(self, shapes: Mapping[str, Tuple[int, ...]]) -> Arrays:
        with self._guard:
            try:
                key = tuple([shapes[name] for name in self._owner.input_names])
            except KeyError as error:
                raise EngineError(f"no shape was given for input {error}") from None
            binding = self._bindings.get(key)
            if binding is None:
                with self._device:
                    binding = self._bind(key)
            elif len(self._bindings) > MAX_BINDINGS // 2:
                self._bindings.move_to_end(key)
            self._staged = binding
            return binding.views

    def _bind(self, key: Shapes) -> Binding:
        if self._closed:
            raise EngineError("the slot was closed")
        owner = self._owner
        self._check_limits(key)
        self._applied = None
        with owner.serial:
            self._set_shapes(key)
            output_shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in self._fixed}
        inputs = pack(owner.input_names, owner.plan_dtypes, dict(zip(owner.input_names, key)))
        outputs = pack(self._fixed, owner.plan_dtypes, output_shapes)
        staging_in, staging_out = self._pool_for(inputs.size, outputs.size)
        views = inputs.views(staging_in.host)
        casts = []
        for name in owner.input_names:
            if owner.host_dtypes[name] != owner.plan_dtypes[name]:
                wide = np.zeros(views[name].shape, owner.host_dtypes[name])
                casts.append((name, wide, views[name]))
                views[name] = wide
        while len(self._bindings) >= MAX_BINDINGS:
            _, oldest = self._bindings.popitem(last=False)
            if oldest.graph is not None:
                oldest.graph.free()
        binding = Binding(
            shapes=key,
            inputs=inputs,
            outputs=outputs,
            staging_in=staging_in,
            staging_out=staging_out,
            views=views,
            results=outputs.views(staging_out.host),
            casts=casts,
            capturable=owner.use_graphs and not self._growing.names,
        )
        self._bindings[key] = binding
        return binding

    def _pool_for(self, in_size: int, out_size: int) -> Tuple[Staging, Staging]:
        """The first pool that both blocks fit in; a larger one is made for unforeseen shapes."""
        for pair in self._pools:
            if in_size <= pair[0].size and out_size <= pair[1].size:
                return pair
        self._add_pool(in_size, out_size, mapped=False)
        return self._pools[-1]

    def _check_limits(self, key: Shapes) -> None:
        for name, shape in zip(self._owner.input_names, key):
            low, _, high = self._owner.limits[name]
            if len(shape) != len(low) or any(not a <= s <= b for a, s, b in zip(low, shape, high)):
                raise EngineError(
                    f"input '{name}' of shape {shape_text(shape)} is outside what the {self._owner.precision} "
                    f"plan takes: {shape_text(low)} to {shape_text(high)}"
                )

    def _set_shapes(self, key: Shapes) -> None:
        for name, shape in zip(self._owner.input_names, key):
            if not self._context.set_input_shape(name, shape):
                raise EngineError(
                    f"the {self._owner.precision} plan refuses shape {shape_text(shape)} for input '{name}': "
                    f"{self._owner.api.messages.tail()}"
                )

    # --- running ----------------------------------------------------------------------------------
    def run(self) -> Arrays:
        with self._guard, self._device:
            binding = self._staged
            if binding is None:
                raise EngineError("run() needs a stage() before it")
            for name, wide, narrow in binding.casts:
                _narrow(name, wide, narrow)
            started = perf_counter()
            try:
                if binding.graph is not None:
                    self._replay(binding)
                else:
                    self._run_plainly(binding)
            except self._device.error_type as error:
                raise self._device.error(f"running {self._owner.precision}", error) from error
            elapsed = perf_counter() - started
            binding.runs += 1
            self._note_times(binding, elapsed)
            if binding.graph is None and binding.capturable and binding.runs >= 2:
                self._capture(binding)
            return self._collect(binding)

    def _replay(self, binding: Binding) -> None:
        assert binding.graph is not None
        binding.graph.launch()
        self._stream.wait(spin=binding.seconds < SPIN_BELOW_S)
        self.graph_launches += 1

    def _run_plainly(self, binding: Binding) -> None:
        self._apply(binding)
        self._enqueue(binding, timed=True, capturing=False)
        self._stream.wait(spin=binding.seconds < SPIN_BELOW_S)
        self.plain_launches += 1

    def _apply(self, binding: Binding) -> None:
        """Tells the context shapes and addresses; a graph has them inside."""
        if self._applied is binding:
            return
        with self._owner.serial:
            self._set_shapes(binding.shapes)
        context = self._context
        for name, address in binding.inputs.addresses(binding.staging_in.address):
            context.set_tensor_address(name, address)
        for name, address in binding.outputs.addresses(binding.staging_out.address):
            context.set_tensor_address(name, address)
        self._growing.attach(context)
        self._applied = binding

    def _enqueue(self, binding: Binding, timed: bool, capturing: bool) -> None:
        stream, timeline = self._stream, self._timeline
        if timed:
            timeline.mark(0, stream, capturing)
        binding.staging_in.upload(stream, binding.inputs.size)
        if timed:
            timeline.mark(1, stream, capturing)
        with self._owner.serial:
            enqueued = self._context.execute_async_v3(stream.handle)
        if not enqueued:
            raise self._device.error(f"running {self._owner.precision}", self._owner.api.messages.tail())
        if timed:
            timeline.mark(2, stream, capturing)
        binding.staging_out.download(stream, binding.outputs.size)
        if timed:
            timeline.mark(3, stream, capturing)

    def _capture(self, binding: Binding) -> None:
        """Captures the binding's graph; when that is refused, its runs stay plain."""
        binding.timed = binding.seconds >= TIMED_FROM_S
        try:
            binding.graph = Graph(
                self._device, self._stream, lambda: self._enqueue(binding, binding.timed, capturing=True)
            )
        except DeviceFailed:
            raise
        except EngineError as error:
            binding.capturable = False
            logger.warning(
                "no CUDA graph for %s at %s: %s", self._owner.precision, binding.shapes, error.message
            )

    def _note_times(self, binding: Binding, elapsed: float) -> None:
        """From the events where there are some; else the time of the whole in the last known shares."""
        if binding.graph is None or binding.timed:
            upload, compute, download = self._timeline.seconds()
            whole = max(upload + compute + download, 1e-9)
            binding.shares = (upload / whole, compute / whole)
            # The first run loads kernels: not a time to judge by.
            binding.seconds = 0.0 if binding.runs == 1 else elapsed
            self._times = StageTimes(upload, compute, download)
        else:
            # Made by `last_times`: short executions are the ones that come this way.
            self._times = None
            self._last = (elapsed, binding.shares)

    def _collect(self, binding: Binding) -> Arrays:
        owner = self._owner
        if not self._growing.names and not owner.cast_outputs:
            return binding.results
        found = dict(binding.results)
        try:
            found.update(self._growing.collect(self._stream, owner.plan_dtypes))
        except self._device.error_type as error:
            raise self._device.error("reading an output", error) from error
        return {name: found[name].astype(owner.host_dtypes[name], copy=False) for name in owner.output_names}

    @property
    def last_times(self) -> StageTimes:
        if self._times is None:
            elapsed, (upload, compute) = self._last
            self._times = StageTimes(
                elapsed * upload, elapsed * compute, elapsed * max(1.0 - upload - compute, 0.0)
            )
        return self._times

    # --- the end ----------------------------------------------------------------------------------
    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._device.failed is None:
            with self._device:
                self._free_memory()
        self._context = None
        self._owner.slot_closed(self)

    def _free_memory(self) -> None:
        for binding in self._bindings.values():
            if binding.graph is not None:
                binding.graph.free()
        self._bindings.clear()
        self._staged = self._applied = None
        self._context = None
        for pair in self._pools:
            for staging in pair:
                staging.free()
        self._pools = []
        self._growing.free()
        self._timeline.free()
        self._stream.free()


def _narrow(name: str, wide: Array, narrow: Array) -> None:
    """Copies into the plan's narrower integers. Raises EngineError rather than wrap a value around."""
    limits = np.iinfo(narrow.dtype)
    if wide.size and (wide.min() < limits.min or wide.max() > limits.max):
        raise EngineError(
            f"input '{name}' holds a value outside {limits.min} to {limits.max}, all that this TensorRT "
            f"version's {narrow.dtype.name} can carry"
        )
    narrow[...] = wide
