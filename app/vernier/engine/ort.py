"""ONNX Runtime on a CPU: the runtime that runs everywhere and needs nothing built.

Slots must not fight for cores, so each gets `intra_op_threads` and no thread spins while it waits. With one
thread a session has no pool of its own and is safe to share, so all slots run one session; with more,
every slot has its own session, or two batches would queue for one pool.

Inputs are staged in the slot's memory, or lie elsewhere, and are fed from there without a copy. Binding the outputs
to memory too was measured and left out: it saved 1.5 µs of 7.8 at batch 1 and nothing at batch 64, and it would make
every answer be copied once more.

Without VNNI an x86 CPU multiplies unsigned by signed bytes through sums of 16 bits, which saturate: a rare
sample gets a wrong answer that no average shows. ONNX Runtime moves INT8 activations to unsigned for the sake
of that instruction; where it saturates they stay signed, which is exact.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Tuple, Type

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from vernier.engine.base import ConflictGuard, Executor, Slot, StageTimes
from vernier.errors import EngineError, WrongShape
from vernier.heap import trim_heap
from vernier.tensors import Array, Arrays, Dim, TensorSpec, bind_dims, numpy_dtype, shape_text

RUNTIME = "onnxruntime"
#: x86's instructions that multiply bytes and sum without saturating on the way.
_VNNI = frozenset(("avx512_vnni", "avx_vnni"))
_PROVIDERS = ["CPUExecutionProvider"]
_FATAL_ONLY = 4  # severity: what goes wrong is raised, and logged by its handler

#: ONNX Runtime's exceptions share no base class of their own, so they are collected from its module;
#: the last three are what its bindings raise for arguments they cannot take.
ORT_ERRORS: Tuple[Type[Exception], ...] = (
    *[item for item in vars(_state).values() if isinstance(item, type) and issubclass(item, Exception)],
    RuntimeError,
    ValueError,
    MemoryError,
)

_DTYPES: Dict[str, str] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    **{
        f"tensor({name})": name
        for name in (
            "float16", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        )
    },
}  # fmt: skip

#: Loading a model whose file is larger leaves memory behind that is worth giving back to the system.
_LARGE_BYTES = 8 * 2**20
#: Distinct shapes whose views a slot remembers; variable-length models may see any number of them.
_REMEMBERED_SHAPES = 256


def exact_int8(options: onnxruntime.SessionOptions, flags: Optional[FrozenSet[str]] = None) -> None:
    """Keeps INT8 products exact on this CPU; see the module's last paragraph.

    Args:
        flags: the CPU's features as Linux names them, instead of those of the CPU at hand.
    """
    if not _VNNI & (_cpu_flags() if flags is None else flags):
        options.add_session_config_entry("session.qdqisint8allowed", "1")


@lru_cache(maxsize=None)
def _cpu_flags() -> FrozenSet[str]:
    """Empty where it is not known, which keeps products exact at some cost."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


@contextmanager
def ort_errors(doing: str) -> Iterator[None]:
    """Turns every error of ONNX Runtime into EngineError."""
    try:
        yield
    except ORT_ERRORS as error:
        raise EngineError(f"ONNX Runtime failed {doing}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says first, or its type when it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()


def _spec(argument: Any) -> TensorSpec:
    """The spec of a session's input or output. Raises EngineError when it is no tensor of a known dtype."""
    dtype = _DTYPES.get(argument.type)
    if dtype is None:
        raise EngineError(
            f"'{argument.name}' is a {argument.type}, which cannot be served: export numeric tensors"
        )
    shape: List[Dim] = []
    for axis, dim in enumerate(argument.shape):
        # An unnamed dimension is free; the name of its place keeps it apart from all others.
        shape.append(dim if isinstance(dim, (int, str)) and dim != "" else f"{argument.name}:{axis}")
    return TensorSpec(argument.name, dtype, tuple(shape))


class OnnxRuntimeExecutor(Executor):
    """One variant on the CPU.

    Args:
        model: the ONNX file; external data lies beside it as `<file>.data`.
        precision: the variant's name.
        intra_op_threads: cores that one execution may use.
        optimize: graph optimizations; the accuracy gate runs without them, serving with them.
        clock: monotonic, in seconds.

    Raises:
        EngineError: the file is not a model that ONNX Runtime can run.
    """

    runtime = RUNTIME
    device = "cpu"
    exact_batch = True

    def __init__(
        self,
        model: Path,
        *,
        precision: str,
        intra_op_threads: int,
        optimize: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.precision = precision
        self._model = model
        self._threads = max(1, intra_op_threads)
        self._optimize = optimize
        self._clock = clock
        began = clock()
        session = self._open_session()
        self.load_seconds = clock() - began
        self.engine_bytes = _size_of(model)
        self.inputs = [_spec(argument) for argument in session.get_inputs()]
        self.outputs = [_spec(argument) for argument in session.get_outputs()]
        self._spare = [session]
        self._closed = False

    def _open_session(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        exact_int8(options)
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if self._optimize else levels.ORT_DISABLE_ALL
        with ort_errors(f"to load {self._model}"):
            session = onnxruntime.InferenceSession(os.fspath(self._model), options, providers=_PROVIDERS)
        if _size_of(self._model) > _LARGE_BYTES:
            trim_heap()  # of what the session needed to load only
        return session

    def open_slot(self) -> Slot:
        if self._closed:
            raise EngineError(f"{self._model} is closed: load it again before opening slots")
        if self._threads == 1:
            return OnnxRuntimeSlot(self._spare[0], self.inputs, self.outputs, self._clock, _keep)
        try:
            session = self._spare.pop()
        except IndexError:
            session = self._open_session()
        return OnnxRuntimeSlot(session, self.inputs, self.outputs, self._clock, self._take_back)

    def _take_back(self, session: Any) -> None:
        if not self._closed:
            self._spare.append(session)

    def close(self) -> None:
        self._closed = True
        self._spare.clear()


def _keep(session: Any) -> None:
    """A shared session stays with its executor."""


def _size_of(model: Path) -> int:
    data = model.with_name(model.name + ".data")
    return model.stat().st_size + (data.stat().st_size if data.exists() else 0)


class OnnxRuntimeSlot(Slot):
    """Staging memory and the session that is fed from it. `run` returns new arrays, never reused ones."""

    fresh_outputs = True
    reads_in_place = True

    def __init__(
        self,
        session: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        clock: Callable[[], float],
        give_back: Callable[[Any], None],
    ) -> None:
        self._session = session
        self._give_back = give_back
        self._inputs = {spec.name: spec for spec in inputs}
        self._names = [spec.name for spec in outputs]
        self._clock = clock
        self._memory: Dict[str, Array] = {}
        self._views: Dict[Tuple[Tuple[int, ...], ...], Arrays] = {}
        self._staged: Arrays = {}
        self._in_place = False  # whether `_staged` is not the slot's own memory
        self._times = StageTimes()
        self._guard = ConflictGuard("an ONNX Runtime slot")

    def stage(self, shapes: Mapping[str, Tuple[int, ...]]) -> Arrays:
        with self._guard:
            key = (
                tuple([shapes[name] for name in self._inputs]) if shapes.keys() == self._inputs.keys() else ()
            )
            views = self._views.get(key)
            if views is None:
                views = self._make_views(shapes)
                if len(self._views) >= _REMEMBERED_SHAPES:
                    self._views.clear()
                self._views[key] = views
            self._staged = views
            self._in_place = False
            return views

    def read_in_place(self, inputs: Arrays) -> None:
        with self._guard:
            self._staged = inputs
            self._in_place = True

    def _make_views(self, shapes: Mapping[str, Tuple[int, ...]]) -> Arrays:
        if shapes.keys() != self._inputs.keys():
            raise EngineError(f"staged {', '.join(shapes)}, but the variant takes {', '.join(self._inputs)}")
        dims: Dict[str, int] = {}
        for name, spec in self._inputs.items():
            try:
                bind_dims(spec, shapes[name], dims)
            except WrongShape as error:
                raise EngineError(
                    f"input '{name}' was staged as {shape_text(shapes[name])}: {error.message}"
                ) from error
        with ort_errors("to get staging memory"):
            return {name: self._view(spec, shapes[name]) for name, spec in self._inputs.items()}

    def _view(self, spec: TensorSpec, shape: Tuple[int, ...]) -> Array:
        elements = 1
        for size in shape:
            elements *= size
        memory = self._memory.get(spec.name)
        if memory is None or memory.size < elements:
            # Doubling, so that growing requests do not allocate each time; older views stay valid.
            size = max(elements, 2 * memory.size if memory is not None else 0)
            memory = self._memory[spec.name] = np.zeros(size, numpy_dtype(spec.dtype))
            self._views.clear()
        return memory[:elements].reshape(shape)

    def run(self) -> Arrays:
        with self._guard:
            if not self._staged:
                raise EngineError("nothing was staged: call stage() before run()")
            began = self._clock()
            try:
                results = self._session.run(self._names, self._staged)
            except ORT_ERRORS as error:
                raise EngineError(f"ONNX Runtime failed to run: {first_line(error)}") from error
            finally:
                if self._in_place:
                    self._staged = {}
            self._times = StageTimes(infer=self._clock() - began)
            return dict(zip(self._names, results))

    @property
    def last_times(self) -> StageTimes:
        return self._times

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._give_back(session)
        self._staged = {}
        self._views.clear()
        self._memory.clear()
