"""The CUDA side of the pool: devices, streams, staging memory, events and graphs.

The only module that knows PyCUDA and cuda-bindings. PyCUDA owns contexts, streams and memory; it has
no CUDA graphs, so capture, launch and the graph's own event nodes go through cuda.bindings on the
same stream handles. Importing this module needs neither; `open_device` does.

Every failure becomes an EngineError, or a DeviceFailed once the device reports an error that every
later call on it would report too.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

import numpy as np

from vernier.errors import DeviceFailed, EngineError
from vernier.tensors import Array

#: CUresult codes after which the context is lost: every later call in this process fails as well.
STICKY = frozenset(
    {
        214,  # ECC uncorrectable
        220,  # NVLink uncorrectable
        700,  # illegal address
        702,  # launch timeout
        710,  # device-side assert
        714,  # hardware stack error
        715,  # illegal instruction
        716,  # misaligned address
        717,  # invalid address space
        718,  # invalid program counter
        719,  # launch failed
        720,  # cooperative launch too large
        721,  # tensor memory leak
        999,  # unknown
    }
)

#: Blocks are packed at this alignment, which TensorRT asks of every tensor's address.
ALIGNMENT = 256

_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
_EVENT_EXTERNAL = 1


class _Libraries:
    """PyCUDA's driver module and cuda.bindings', imported and initialized once."""

    def __init__(self) -> None:
        try:
            import pycuda.driver as pycuda
        except ImportError as error:
            raise EngineError(
                f"PyCUDA is not usable here ({error}); install vernier[tensorrt] and NVIDIA's driver"
            ) from error
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise EngineError(f"cuda-bindings is not installed ({error})") from error
        self.pycuda: Any = pycuda
        self.driver: Any = driver
        try:
            pycuda.init()
            self.count: int = pycuda.Device.count()
        except pycuda.Error as error:
            raise EngineError(f"there is no usable NVIDIA GPU here: {error}") from error


_libraries: Optional[_Libraries] = None
_devices: Dict[int, Device] = {}
_opening = threading.Lock()


def count_devices() -> int:
    """How many GPUs CUDA sees. Raises EngineError when there is no driver, no GPU, or a package is missing."""
    with _opening:
        return _load_libraries().count


def open_device(index: int = 0) -> Device:
    """The device of this index (as CUDA numbers them), one object for the whole process.

    Raises EngineError when there is no driver, no such device, or a package is missing.
    """
    with _opening:
        libraries = _load_libraries()
        if not 0 <= index < libraries.count:
            raise EngineError(f"there is no GPU {index} here; CUDA sees {libraries.count}")
        if index not in _devices:
            _devices[index] = Device(libraries, index)
        return _devices[index]


def _or_another() -> str:
    """After an illegal access on one GPU, CUDA reports it for every other one of the process too."""
    return ", or another of this process," if len(_devices) > 1 else ""


def _load_libraries() -> _Libraries:
    global _libraries
    if _libraries is None:
        _libraries = _Libraries()
    return _libraries


class Device:
    """One GPU's primary context; `with device:` makes it current on the calling thread.

    Attributes:
        index: CUDA's number of it.
        name: such as `NVIDIA H200`.
        compute_capability: such as `9.0`.
        memory_bytes: all of its memory.
        failed: why nothing can run on it any more; None while it works.
    """

    def __init__(self, libraries: _Libraries, index: int) -> None:
        self._lib = libraries
        self._pycuda = libraries.pycuda
        self.error_type: Type[Exception] = libraries.pycuda.Error
        self.index = index
        self.failed: Optional[str] = None
        try:
            device = self._pycuda.Device(index)
            self.name: str = device.name()
            self.compute_capability = ".".join(str(part) for part in device.compute_capability())
            self.memory_bytes: int = device.total_memory()
            self.pci_bus_id: str = device.pci_bus_id()
            self._context = device.retain_primary_context()
        except self.error_type as error:
            raise EngineError(f"GPU {index} cannot be used: {error}") from error

    def __enter__(self) -> Device:
        if self.failed is not None:
            raise DeviceFailed(self.failed)
        self._context.push()
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._context.pop()

    def __repr__(self) -> str:
        return f"cuda:{self.index}"

    # --- errors -----------------------------------------------------------------------------------
    def error(self, what: str, reason: object) -> EngineError:
        """What a failed call becomes: DeviceFailed when the device is lost, else EngineError.

        Args:
            what: what was tried, such as "running int8".
            reason: the library's exception or message.
        """
        code = int(self._lib.driver.cuCtxSynchronize()[0])
        if self.failed is None and code in STICKY:
            self.failed = (
                f"GPU {self.index} ({self.name}){_or_another()} failed while {what}: {self._describe(code)}; "
                f"nothing can run on it until this process restarts"
            )
        if self.failed is not None:
            return DeviceFailed(self.failed)
        if isinstance(reason, self._pycuda.MemoryError):
            free, total = self._pycuda.mem_get_info()
            return EngineError(
                f"GPU {self.index} has no memory left for {what} ({free >> 20} of {total >> 20} MiB are free): "
                f"load fewer models or use fewer slots"
            )
        return EngineError(f"{what} on GPU {self.index} failed: {reason}")

    def _describe(self, code: int) -> str:
        text = self._lib.driver.cuGetErrorString(self._lib.driver.CUresult(code))[1]
        return f"{text.decode() if text else 'unknown error'} (CUDA error {code})"

    def check(self, result: Tuple[Any, ...], what: str) -> Any:
        """The value of a cuda.bindings call, whose first item is its error code. Raises EngineError."""
        if int(result[0]) != 0:
            raise self.error(what, self._describe(int(result[0])))
        return result[1] if len(result) == 2 else result[1:]

    # --- what lives on it; each needs the device to be current -------------------------------------
    @property
    def driver(self) -> Any:
        return self._lib.driver

    def memory_used(self) -> int:
        """Bytes in use on the whole GPU, by every process."""
        with self:
            free, total = self._pycuda.mem_get_info()
        return int(total - free)

    def make_stream(self) -> Stream:
        return Stream(self)

    def allocate(self, size: int) -> DeviceMemory:
        return DeviceMemory(self, size)

    def allocate_staging(self, size: int, mapped: bool = False) -> Staging:
        return Staging(self, size, mapped)


class Stream:
    """A stream of its own: it does not wait for the legacy default stream."""

    def __init__(self, device: Device) -> None:
        try:
            self.raw: Any = device._pycuda.Stream(_NON_BLOCKING)
            # Waits on the driver's interrupt instead of spinning; for executions long enough to pay.
            self._done: Any = device._pycuda.Event(
                device._pycuda.event_flags.BLOCKING_SYNC | device._pycuda.event_flags.DISABLE_TIMING
            )
        except device.error_type as error:
            raise device.error("making a stream", error) from error
        self.handle: int = self.raw.handle
        self.driver_handle = device.driver.CUstream(self.handle)

    def wait(self, spin: bool) -> None:
        """Until everything enqueued is done. PyCUDA's errors pass through."""
        if spin:
            self.raw.synchronize()
        else:
            self._done.record(self.raw)
            self._done.synchronize()

    def free(self) -> None:
        """PyCUDA destroys a stream with its last reference, which must go while the device is current."""
        self.raw = self._done = None


class DeviceMemory:
    """A plain allocation on the GPU."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = max(size, ALIGNMENT)
        self._pycuda = device._pycuda
        try:
            self._raw: Any = self._pycuda.mem_alloc(self.size)
        except device.error_type as error:
            raise device.error(f"allocating {self.size >> 10} KiB", error) from error
        self.address = int(self._raw)

    def read(self, array: Array, stream: Stream) -> None:
        """Copies the first bytes into `array` and waits. PyCUDA's errors pass through."""
        self._pycuda.memcpy_dtoh_async(array, self.address, stream.raw)
        stream.raw.synchronize()

    def free(self) -> None:
        if self._raw is not None:
            self._raw.free()
            self._raw = None


class Staging:
    """Pinned host memory and as much device memory beside it, copied one way in one piece.

    With `mapped`, kernels read and write the pinned memory itself over the bus and there is nothing to
    copy: for a few kilobytes that is sooner done than a copy.
    """

    def __init__(self, device: Device, size: int, mapped: bool) -> None:
        pycuda = device._pycuda
        self.size = max(size, ALIGNMENT)
        self.mapped = mapped
        self._device = device
        self._memory: Optional[DeviceMemory] = None
        flags = pycuda.host_alloc_flags.PORTABLE | (pycuda.host_alloc_flags.DEVICEMAP if mapped else 0)
        try:
            self.host: Array = pycuda.pagelocked_empty(self.size, np.uint8, mem_flags=flags)
        except device.error_type as error:
            raise device.error(f"pinning {self.size >> 10} KiB of host memory", error) from error
        # Whatever a client never wrote must not be another client's data.
        self.host.fill(0)
        self._allocation: Any = self.host.base
        try:
            if mapped:
                self.address = int(self._allocation.get_device_pointer())
            else:
                self._memory = DeviceMemory(device, self.size)
                self.address = self._memory.address
        except BaseException:
            self.free()
            raise

    def upload(self, stream: Stream, size: int) -> None:
        """Enqueues the copy of the first `size` bytes to the GPU."""
        if not self.mapped and size:
            self._device._pycuda.memcpy_htod_async(self.address, self.host[:size], stream.raw)

    def download(self, stream: Stream, size: int) -> None:
        """Enqueues the copy of the first `size` bytes from the GPU."""
        if not self.mapped and size:
            self._device._pycuda.memcpy_dtoh_async(self.host[:size], self.address, stream.raw)

    def free(self) -> None:
        if self._memory is not None:
            self._memory.free()
            self._memory = None
        if self._allocation is not None:
            self._allocation.free()
            self._allocation = None


class Timeline:
    """Four events around upload, compute and download; in a captured graph they are nodes of it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._driver = device.driver
        self._events: List[Any] = []
        for _ in range(4):
            self._events.append(device.check(self._driver.cuEventCreate(0), "making an event"))

    def mark(self, index: int, stream: Stream, capturing: bool) -> None:
        flags = _EVENT_EXTERNAL if capturing else 0
        result = self._driver.cuEventRecordWithFlags(self._events[index], stream.driver_handle, flags)
        self._device.check(result, "recording an event")

    def seconds(self) -> Tuple[float, float, float]:
        """Of upload, compute and download; after the stream was waited for."""
        elapsed = [
            self._device.check(self._driver.cuEventElapsedTime(a, b), "reading an event") / 1e3
            for a, b in zip(self._events, self._events[1:])
        ]
        return elapsed[0], elapsed[1], elapsed[2]

    def free(self) -> None:
        for event in self._events:
            self._driver.cuEventDestroy(event)
        self._events = []


class Graph:
    """What `work` enqueues on a stream, captured once and launched as often as wanted."""

    def __init__(self, device: Device, stream: Stream, work: Callable[[], None]) -> None:
        """Raises EngineError when the work cannot be captured; the stream is usable afterwards."""
        driver = device.driver
        self._device = device
        self._driver = driver
        self._stream = stream.driver_handle
        self._exec: Any = None
        mode = driver.CUstreamCaptureMode(_CAPTURE_THREAD_LOCAL)
        device.check(driver.cuStreamBeginCapture(self._stream, mode), "starting a graph capture")
        try:
            work()
        except BaseException as error:
            code, graph = driver.cuStreamEndCapture(self._stream)
            if int(code) == 0 and graph is not None:
                driver.cuGraphDestroy(graph)
            if isinstance(error, device.error_type):
                raise device.error("capturing a graph", error) from error
            raise
        graph = device.check(driver.cuStreamEndCapture(self._stream), "capturing a graph")
        try:
            self._exec = device.check(driver.cuGraphInstantiate(graph, 0), "instantiating a graph")
        finally:
            driver.cuGraphDestroy(graph)

    def launch(self) -> None:
        result = self._driver.cuGraphLaunch(self._exec, self._stream)
        if int(result[0]) != 0:
            self._device.check(result, "launching a graph")

    def free(self) -> None:
        if self._exec is not None:
            self._driver.cuGraphExecDestroy(self._exec)
            self._exec = None
