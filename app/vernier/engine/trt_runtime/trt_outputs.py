"""Outputs whose shape only the run itself can tell: TensorRT asks for their memory while it runs."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from vernier.engine.cuda import Device, DeviceMemory, Stream
from vernier.engine.layout import tensor_bytes
from vernier.engine.trt_runtime.trt_api import TrtApi
from vernier.errors import EngineError
from vernier.tensors import Arrays


class DynamicOutputAllocator:
    """Memory of all outputs of data-dependent shape of one execution context; it grows, never shrinks."""

    def __init__(self, device: Device, api: TrtApi, names: List[str]) -> None:
        self.names = tuple(names)
        self._device = device
        self._memory: Dict[str, DeviceMemory] = {}
        self._shapes: Dict[str, Tuple[int, ...]] = {}
        self._allocators = {name: _make_allocator(api, self) for name in names}
        self.failure: Optional[Exception] = None

    def attach(self, context: Any) -> None:
        for name, allocator in self._allocators.items():
            context.set_output_allocator(name, allocator)

    def reserve(self, name: str, size: int) -> int:
        """Called by TensorRT during a run; 0 tells it that there is no memory."""
        known = self._memory.get(name)
        if known is None or known.size < size:
            if known is not None:
                known.free()
                del self._memory[name]
            try:
                self._memory[name] = self._device.allocate(size)
            except Exception as error:  # raised again by `collect`: it may not pass through TensorRT's frames
                self.failure = error
                return 0
        return self._memory[name].address

    def note_shape(self, name: str, shape: Any) -> None:
        self._shapes[name] = tuple(shape)

    def collect(self, stream: Stream, dtypes: Mapping[str, np.dtype]) -> Arrays:
        """Copies the outputs to the host, after the run was waited for."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        found: Arrays = {}
        for name in self.names:
            array = np.empty(self._shapes[name], dtypes[name])
            size = tensor_bytes(array.dtype, array.shape)
            if size > self._memory[name].size:
                raise EngineError(
                    f"TensorRT gave output '{name}' {size} bytes, but had asked for {self._memory[name].size}"
                )
            if size:
                self._memory[name].read(array, stream)
            found[name] = array
        return found

    def free(self) -> None:
        for memory in self._memory.values():
            memory.free()
        self._memory = {}


def _make_allocator(api: TrtApi, outputs: DynamicOutputAllocator) -> Any:
    class Allocator(api.module.IOutputAllocator):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            # TensorRT's classes crash the process when their own constructor was not called.
            api.module.IOutputAllocator.__init__(self)

        def reallocate_output(self, tensor_name: str, memory: Any, size: int, alignment: int) -> int:
            return outputs.reserve(tensor_name, size)

        def reallocate_output_async(
            self, tensor_name: str, memory: Any, size: int, alignment: int, stream: int
        ) -> int:
            return outputs.reserve(tensor_name, size)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            outputs.note_shape(tensor_name, shape)

    return Allocator()
