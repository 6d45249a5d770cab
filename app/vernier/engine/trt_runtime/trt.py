"""TensorRT, TensorRT-RTX and the lean runtime: one plan on one GPU, shared by its slots."""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, ContextManager, Dict, List, Optional, Sequence, Tuple

import numpy as np

from vernier.engine.base import Executor
from vernier.engine.cuda import Device
from vernier.engine.trt_runtime.trt_api import TrtApi
from vernier.engine.trt_runtime.trt_slot import Limits, TensorRtSlot
from vernier.errors import EngineError
from vernier.tensors import TensorSpec, numpy_dtype

logger = logging.getLogger(__name__)

#: Batches whose inputs and outputs both fit in this many bytes are read and written over the bus by
#: the kernels themselves instead of being copied. See benchmarks/GPU.md for what it gains.
MAPPED_BYTES = 4 << 10


class TensorRtExecutor(Executor):
    """See `vernier.engine.base.Executor`.

    Attributes:
        cuda: the device.
        engine: TensorRT's engine; None once closed.
        limits: input → (min, opt, max) shapes that the plan takes.
        host_dtypes, plan_dtypes: NumPy types of each tensor for callers, and inside the plan.
        cast_outputs: whether any output's type differs between the two.
        max_slots: how many slots can be open at once; None when only memory limits them.
    """

    exact_batch = False

    def __init__(
        self,
        plan: bytes,
        *,
        api: TrtApi,
        device: Device,
        precision: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        use_graphs: bool = True,
        mapped_bytes: int = MAPPED_BYTES,
        runtime_cache: Optional[Path] = None,
    ) -> None:
        """Deserializes `plan`, whose hash the caller has verified: a plan is native code.

        Args:
            use_graphs: capture a CUDA graph for each set of shapes.
            mapped_bytes: see MAPPED_BYTES; 0 copies every batch.
            runtime_cache: where tensorrt-rtx keeps the kernels that it compiled on this GPU.

        Raises:
            EngineError: TensorRT refused the plan, or it has other tensors than the manifest says.
        """
        self.precision = precision
        self.runtime = api.runtime
        self.device = repr(device)
        self.inputs = inputs
        self.outputs = outputs
        self.api = api
        self.cuda = device
        self.use_graphs = use_graphs
        self.mapped_bytes = mapped_bytes
        self.input_names: Sequence[str] = [spec.name for spec in inputs]
        self.output_names: Sequence[str] = [spec.name for spec in outputs]
        self.host_dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in [*inputs, *outputs]}
        self.engine_bytes = len(plan)
        self._lock = threading.Lock()
        # TensorRT 8.5 looks shapes up in the engine, by name and profile, and two contexts that do so at
        # once get each other's: observed as a refused shape. Graphs, once captured, need none of it.
        self.serial: ContextManager[Any] = threading.Lock() if api.below_10 else nullcontext()
        self._slots: List[TensorRtSlot] = []
        self._past_launches = (0, 0)
        self._runtime_cache_path = runtime_cache
        self._runtime_config: Any = None
        self._runtime_cache: Any = None
        started = perf_counter()
        with device:
            self._runtime: Any = api.make_runtime()
            api.messages.clear()
            self.engine: Any = self._runtime.deserialize_cuda_engine(plan)
            if self.engine is None:
                raise self.cuda.error(f"loading the {precision} plan", api.messages.tail())
            self._check_tensors()
            self._make_runtime_config()
        self.load_seconds = perf_counter() - started
        self.plan_dtypes: Dict[str, np.dtype[Any]] = {
            name: numpy_dtype(api.dtype_name(self.engine.get_tensor_dtype(name))) for name in self.host_dtypes
        }
        self.cast_outputs = any(self.plan_dtypes[n] != self.host_dtypes[n] for n in self.output_names)
        self.limits: Dict[str, Limits] = {name: self._limits_of(name) for name in self.input_names}
        self.max_slots: Optional[int] = None if api.shares_profile else self.engine.num_optimization_profiles

    def _check_tensors(self) -> None:
        """The plan's inputs and outputs are the manifest's, by name, direction and type."""
        engine, trt = self.engine, self.api.module
        found: Dict[str, Tuple[bool, str]] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            found[name] = (is_input, self.api.dtype_name(engine.get_tensor_dtype(name)))
        wanted = {s.name: (True, self.api.plan_dtype(s.dtype)) for s in self.inputs}
        wanted.update({s.name: (False, self.api.plan_dtype(s.dtype)) for s in self.outputs})
        if found != wanted:
            raise EngineError(
                f"the {self.precision} plan has the tensors {sorted(found)}, the manifest says "
                f"{sorted(wanted)}, or their types differ; build the plan again"
            )

    def _limits_of(self, name: str) -> Limits:
        low, opt, high = self.engine.get_tensor_profile_shape(name, 0)
        return tuple(low), tuple(opt), tuple(high)

    def _make_runtime_config(self) -> None:
        """tensorrt-rtx alone compiles at run time: its kernels are kept, its own graphs left off."""
        if not hasattr(self.api.module, "CudaGraphStrategy"):
            return
        config = self.engine.create_runtime_config()
        config.cuda_graph_strategy = self.api.module.CudaGraphStrategy.DISABLED
        cache = config.create_runtime_cache()
        path = self._runtime_cache_path
        if path is not None and path.is_file():
            cache.deserialize(path.read_bytes())
        config.set_runtime_cache(cache)
        self._runtime_config, self._runtime_cache = config, cache

    def open_slot(self) -> TensorRtSlot:
        with self._lock, self.cuda:
            if self.engine is None:
                raise EngineError(f"the {self.precision} engine was closed")
            profile = self._free_profile()
            self.api.messages.clear()
            if self._runtime_config is not None:
                context = self.engine.create_execution_context(self._runtime_config)
            else:
                context = self.engine.create_execution_context()
            if context is None:
                raise self.cuda.error(f"opening a slot of {self.precision}", self.api.messages.tail())
            slot = TensorRtSlot(self, profile, context)
            self._slots.append(slot)
            return slot

    def _free_profile(self) -> int:
        """Below TensorRT 10 every context needs an optimization profile of its own."""
        if self.max_slots is None:
            return 0
        free = set(range(self.max_slots)) - {slot.profile for slot in self._slots}
        if not free:
            raise EngineError(
                f"the {self.precision} plan has {self.max_slots} optimization profile(s), so no more slots "
                f"than that; build it with more profiles or set fewer slots"
            )
        return min(free)

    def slot_closed(self, slot: TensorRtSlot) -> None:
        """Called by the slot."""
        with self._lock:
            if slot in self._slots:
                self._slots.remove(slot)
                graphs, plain = self._past_launches
                self._past_launches = (graphs + slot.graph_launches, plain + slot.plain_launches)

    @property
    def launches(self) -> Tuple[int, int]:
        """Executions of all slots so far, closed ones too: by graph, and call by call. It never falls."""
        with self._lock:
            graphs, plain = self._past_launches
            return (
                graphs + sum(slot.graph_launches for slot in self._slots),
                plain + sum(slot.plain_launches for slot in self._slots),
            )

    def close(self) -> None:
        if self.engine is None:
            return
        if self._slots:
            raise EngineError(f"{len(self._slots)} slot(s) of {self.precision} are still open")
        self._save_runtime_cache()
        if self.cuda.failed is None:
            with self.cuda:
                self._runtime_config = self._runtime_cache = None
                self.engine = None
                self._runtime = None
        self.engine = None

    def _save_runtime_cache(self) -> None:
        path = self._runtime_cache_path
        if self._runtime_cache is None or path is None:
            return
        temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
        try:
            temporary.write_bytes(bytes(self._runtime_cache.serialize()))
            temporary.replace(path)
        except OSError as error:
            logger.warning("cannot keep the compiled kernels of %s: %s", self.precision, error)
