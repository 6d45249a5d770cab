"""The three TensorRT packages behind one face: which is here, what it can do, and its messages.

`tensorrt`, `tensorrt_rtx` and `tensorrt_lean` share their Python API but for a few names. All of
those differences are asked here; `vernier.engine.trt_runtime.trt` and `vernier.builder.plans.plan` ask no version.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Deque, Dict, List, Optional

from vernier.errors import EngineError
from vernier.package.plans import version_parts

logger = logging.getLogger(__name__)

#: runtime → (module, what to install)
_PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt (NVIDIA's container image has it)"),
    "tensorrt-rtx": ("tensorrt_rtx", "vernier[tensorrt-rtx]"),
    "tensorrt-lean": ("tensorrt_lean", "vernier[tensorrt-lean]"),
}
RUNTIMES = tuple(_PACKAGES)

#: TensorRT 8.5 says so of every look-up by name in a plan with several profiles, and does the right thing.
_PROFILE_NOISE = "is not in profile"

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


class Messages:
    """The last warnings and errors of TensorRT, for the sentence of the error that follows.

    TensorRT logs from any thread; `tail` gives what the calling thread's last calls caused.
    """

    def __init__(self, size: int = 64) -> None:
        self._lines: Deque[str] = deque(maxlen=size)
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        with self._lock:
            self._lines.append(text)

    def clear(self) -> None:
        with self._lock:
            self._lines.clear()

    def lines(self) -> List[str]:
        with self._lock:
            return list(self._lines)

    def tail(self, fallback: str = "TensorRT gave no reason") -> str:
        """The newest line, without its line breaks."""
        lines = self.lines()
        return " ".join(lines[-1].split()) if lines else fallback


@dataclass(frozen=True)
class TrtApi:
    """One TensorRT package.

    Attributes:
        runtime: the name used in manifests, such as `tensorrt-rtx`.
        module: the imported package.
        version: its full version, such as `8.5.1.7`.
        messages: filled by `log`, the one logger that every object of this package gets.
    """

    runtime: str
    module: Any
    version: str
    messages: Messages
    log: Any = field(repr=False)

    @property
    def major(self) -> int:
        return version_parts(self.version)[0]

    @property
    def below_10(self) -> bool:
        """True for TensorRT 8 and 9: precision by builder flags, one profile for each context."""
        return self.runtime == "tensorrt" and self.major < 10

    @property
    def form(self) -> str:
        """Which lowering of a variant this package builds from: `strong` or `trt8`."""
        return "trt8" if self.below_10 else "strong"

    @property
    def can_build(self) -> bool:
        return hasattr(self.module, "Builder")

    @property
    def builds_without_gpu(self) -> bool:
        return self.runtime == "tensorrt-rtx"

    @property
    def shares_profile(self) -> bool:
        """Whether several contexts may use one optimization profile at the same time."""
        return not self.below_10

    def flag(self, enum: str, name: str) -> Optional[Any]:
        """A member of one of the package's enumerations, or None where this version has none."""
        return getattr(getattr(self.module, enum, None), name, None)

    def network_flags(self) -> int:
        """Explicit batch below 10 (implicit batch is gone since), strong types wherever they exist."""
        flags = 0
        if self.below_10:
            flags |= 1 << int(self.module.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
        else:
            flags |= 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return flags

    def dtype_name(self, dtype: Any) -> str:
        """`float32` for DataType.FLOAT. Raises EngineError for a type that cannot be served."""
        name = str(dtype).rpartition(".")[2]
        try:
            return _DTYPES[name]
        except KeyError:
            raise EngineError(f"tensors of TensorRT type {name} cannot be served") from None

    def plan_dtype(self, dtype: str) -> str:
        """The type that an input or output of ONNX type `dtype` has in a plan: below 10, int64 is int32."""
        return "int32" if dtype == "int64" and self.flag("DataType", "INT64") is None else dtype

    def make_runtime(self) -> Any:
        """A runtime that never runs host code out of a plan.

        The caller holds a CUDA context: without a driver, tensorrt-lean returns an object that crashes
        the process on its first use.
        """
        self.messages.clear()
        runtime = self.module.Runtime(self.log)
        if runtime is None:
            raise EngineError(f"{self.runtime} {self.version} could not start: {self.messages.tail()}")
        if hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = False
        return runtime


def _make_logger(module: Any, messages: Messages) -> Any:
    severity = module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class ToLogging(module.ILogger):  # type: ignore[misc]
        """TensorRT's messages in Python's logging; its VERBOSE is dropped, its INFO is our DEBUG."""

        def __init__(self) -> None:
            # Without this call the first message crashes the process.
            module.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            known = levels.get(level)
            if known is None or _PROFILE_NOISE in text:
                return
            if known >= logging.ERROR:
                messages.add(text)
            # A refused plan or graph becomes an exception with the same words: not twice as an error.
            logger.log(min(known, logging.WARNING) if known >= logging.WARNING else known, "%s", text)

    return ToLogging()


_loaded: Dict[str, TrtApi] = {}
_loading = threading.Lock()


def load_api(runtime: str) -> TrtApi:
    """Imports the package of `runtime`, once. Raises EngineError with what to install."""
    if runtime not in _PACKAGES:
        raise EngineError(f"runtime must be one of {', '.join(RUNTIMES)}, not '{runtime}'")
    module_name, install = _PACKAGES[runtime]
    with _loading:
        if runtime not in _loaded:
            try:
                module = importlib.import_module(module_name)
            except (ImportError, OSError) as error:
                raise EngineError(f"{runtime} is not usable here ({error}); install {install}") from error
            if not hasattr(module, "ILogger"):
                raise EngineError(
                    f"the installed package '{module_name}' holds no TensorRT libraries; install {install}"
                )
            messages = Messages()
            _loaded[runtime] = TrtApi(
                runtime, module, module.__version__, messages, _make_logger(module, messages)
            )
        return _loaded[runtime]
