"""What every runtime promises: an executor runs one variant on one device, a slot is one place to run it.

An executor is shared and thread-safe; a slot belongs to one thread at a time, and a second thread
that enters it gets SlotConflict instead of undefined behaviour. The way of a batch:

    views = slot.stage({"dense": (8, 13)})     # writable arrays in the slot's own memory
    views["dense"][:5] = rows                  # the caller writes every row it cares for
    outputs = slot.run()                       # arrays of 8 rows, valid until the next stage()
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import List, Mapping, Optional, Sequence, Tuple, Type

from vernier.errors import EngineError, SlotConflict
from vernier.tensors import Arrays, TensorSpec


@dataclass(frozen=True)
class StageTimes:
    """Seconds of the last run, by stage. On a CPU everything is `infer`."""

    input: float = 0.0
    infer: float = 0.0
    output: float = 0.0


class ConflictGuard:
    """Turns illegal sharing into SlotConflict. Entering costs one non-blocking lock operation."""

    def __init__(self, what: str) -> None:
        self._lock = threading.Lock()
        self._what = what

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise SlotConflict(f"{self._what} was used by two threads at the same time")

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._lock.release()


class Slot(ABC):
    """One execution context with its staging memory (and, on a GPU, its stream and device buffers)."""

    #: True when `run` returns arrays that no later run touches, so that they need not be copied.
    fresh_outputs = False
    #: True when a run can read its inputs where they lie, so that they need not be staged; see `read_in_place`.
    reads_in_place = False

    @abstractmethod
    def stage(self, shapes: Mapping[str, Tuple[int, ...]]) -> Arrays:
        """Returns one writable array per input, of exactly these shapes, in the slot's own memory.

        The contents are whatever the last run left there. Raises EngineError when a shape is outside
        what the variant takes.
        """

    def read_in_place(self, inputs: Arrays) -> None:
        """Has the next run, and only that one, read these arrays instead of staged ones.

        They must be contiguous and aligned, and must not be changed before the run has ended. Nothing refers to
        them afterwards, and no output lies in their memory. Raises EngineError where `reads_in_place` is False.
        """
        raise EngineError("this slot reads what is staged only: call stage() and fill the arrays")

    @abstractmethod
    def run(self) -> Arrays:
        """Runs what was staged and waits for it.

        Returns one array per output, valid until the next `stage`. Raises EngineError, or DeviceFailed
        when nothing can run on the device any more.
        """

    @property
    @abstractmethod
    def last_times(self) -> StageTimes:
        """How long the stages of the last `run` took."""

    @abstractmethod
    def close(self) -> None:
        """Releases the slot's memory. Idempotent."""


class Executor(ABC):
    """One variant on one device.

    Attributes:
        precision: the variant's name, such as `int8`.
        runtime: such as `onnxruntime`.
        device: such as `cpu` or `cuda:0`.
        inputs, outputs: specs in graph order.
        engine_bytes: size of what was loaded (weights and plan), in bytes.
        load_seconds: how long loading took.
        exact_batch: True when any batch size costs no more than its padded bucket, so that no
            padding is wanted; False when batches must be padded to a bucket.
    """

    precision: str
    runtime: str
    device: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    engine_bytes: int
    load_seconds: float
    exact_batch: bool

    @abstractmethod
    def open_slot(self) -> Slot:
        """A new slot. Raises EngineError when the device has no memory left for it."""

    @abstractmethod
    def close(self) -> None:
        """Releases the executor; every slot must be closed before. Idempotent."""

    @property
    def parts(self) -> Sequence[Executor]:
        """One executor for each device that this one spans, by device index; itself alone where that is one."""
        return (self,)

    @property
    def launches(self) -> Tuple[int, int]:
        """Executions so far by CUDA graph, and without one although one was wanted; neither ever falls."""
        return (0, 0)


def run_once(slot: Slot, inputs: Arrays) -> Arrays:
    """Stages `inputs` as they are, runs, and returns copies of the outputs."""
    views = slot.stage({name: array.shape for name, array in inputs.items()})
    for name, array in inputs.items():
        views[name][...] = array
    return {name: array.copy() for name, array in slot.run().items()}


def default_buckets(max_batch: int) -> List[int]:
    """Powers of two up to and including `max_batch`: 1, 2, 4 … max_batch."""
    buckets = []
    size = 1
    while size < max_batch:
        buckets.append(size)
        size *= 2
    return [*buckets, max_batch]
