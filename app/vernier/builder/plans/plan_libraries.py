"""Which of the libraries that a TensorRT builder may borrow tactics from answer on this machine.

Asked for cuBLAS or cuDNN where they are missing, TensorRT fails in the middle of a build; so such
tactic sources are switched off first. A file that loads but gives no version counts as missing.
"""

from __future__ import annotations

import ctypes
from typing import Callable, Dict, List, Tuple

from vernier.engine.trt_runtime.trt_api import TrtApi


def _cublas(library: ctypes.CDLL) -> bool:
    value = ctypes.c_int(-1)
    return library.cublasGetProperty(0, ctypes.byref(value)) == 0 and value.value >= 0


def _cublas_lt(library: ctypes.CDLL) -> bool:
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return int(library.cublasLtGetVersion()) >= 1000


def _cudnn(library: ctypes.CDLL) -> bool:
    library.cudnnGetVersion.restype = ctypes.c_size_t
    return int(library.cudnnGetVersion()) >= 1000


#: tactic source → (library without its major version, majors, check)
_LIBRARIES: Dict[str, Tuple[str, Tuple[int, ...], Callable[[ctypes.CDLL], bool]]] = {
    "CUBLAS": ("libcublas.so", (11, 12, 13), _cublas),
    "CUBLAS_LT": ("libcublasLt.so", (11, 12, 13), _cublas_lt),
    "CUDNN": ("libcudnn.so", (8, 9), _cudnn),
}


def _loaded(name: str) -> List[str]:
    """The files of this name that the process has loaded already: the ones TensorRT itself was linked to."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if f"/{name}." in line}
    except OSError:
        return []
    return sorted(paths)


def library_answers(source: str) -> bool:
    """Whether the library behind a tactic source is here and tells its version."""
    name, majors, check = _LIBRARIES[source]
    for candidate in _loaded(name) or [f"{name}.{major}" for major in majors]:
        try:
            if check(ctypes.CDLL(candidate)):
                return True
        except (OSError, AttributeError):
            continue
    return False


def usable_tactic_sources(api: TrtApi, enabled: int) -> Tuple[int, str]:
    """The bit set of sources without those whose library is missing, and a note (empty: none was)."""
    missing: List[str] = []
    for source in _LIBRARIES:
        member = api.flag("TacticSource", source)
        if member is not None and enabled >> int(member) & 1 and not library_answers(source):
            enabled &= ~(1 << int(member))
            missing.append(source)
    return enabled, f"without tactics of {', '.join(missing)}, not installed here" if missing else ""
