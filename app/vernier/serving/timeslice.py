"""How long a thread computes before another that is ready gets its core: sched_setattr(2) and sched_getattr(2).

Ordinary and batch threads have had a slice of their own since Linux 6.12; older kernels take the wish and ignore it.
Neither Python nor the C library (before glibc 2.41) has names for these calls, so they are made by number.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Callable
from functools import cache

from vernier.heap import c_function

#: The numbers of sched_setattr and sched_getattr (asm/unistd.h).
_SET, _GET = {"x86_64": (314, 315), "aarch64": (274, 275)}.get(platform.machine(), (None, None))
#: struct sched_attr, version 0 (sched_setattr(2)): size, policy, flags, nice, priority, runtime, deadline, period.
_ATTR = struct.Struct("=IIQiIQQQ")
_KEEP_POLICY = 0x08


def time_slice(thread: int) -> float | None:
    """Seconds; 0 where the kernel knows no slices. None when it does not say, or the thread has ended."""
    buffer = ctypes.create_string_buffer(_ATTR.size)
    if not _call(_GET, thread, buffer, _ATTR.size, 0):
        return None
    return float(_ATTR.unpack(buffer.raw)[5]) / 1e9


def set_time_slice(thread: int, seconds: float) -> bool:
    """Changes nothing else about the thread. The kernel limits it to 0.1 to 100 ms; 0 stands for its default.

    Returns whether it was taken: not without the call, nor where it is forbidden, nor for a thread that has ended.
    """
    try:
        nice = os.getpriority(os.PRIO_PROCESS, thread)
    except OSError:
        return False
    attr = _ATTR.pack(_ATTR.size, 0, _KEEP_POLICY, nice, 0, round(1e9 * seconds), 0, 0)
    return _call(_SET, thread, ctypes.create_string_buffer(attr, _ATTR.size), 0)


def _call(number: int | None, *arguments: int | ctypes.Array[ctypes.c_char]) -> bool:
    syscall = _syscall()
    return number is not None and syscall is not None and syscall(number, *arguments) == 0


@cache
def _syscall() -> Callable[..., int] | None:
    return c_function("syscall") if sys.platform == "linux" else None
