"""The service with a GPU that is lost on demand: `LOSE_GPU=1 LOSE_WHEN=/some/file python -m tests.gpu.losing`.

Once the file exists, a kernel writes where there is no memory, and CUDA takes the whole context away: no
other way is known to make a real device fail.
"""

from __future__ import annotations

import os
import runpy
import threading
import time
from pathlib import Path
from typing import Any, List

from vernier.engine.cuda import Device, open_device

_PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry lose() { .reg .u64 %rd; .reg .u32 %r; mov.u64 %rd, 64; mov.u32 %r, 1; st.global.u32 [%rd], %r; ret; }
"""
_kept: List[Any] = []  # freeing a module of a lost context ends the process


def lose(device: Device) -> None:
    """Returns at once; the next call on the device meets the error."""
    import pycuda.driver as pycuda

    with device:
        _kept.append(pycuda.module_from_buffer(_PTX))
        _kept[-1].get_function("lose")(block=(1, 1, 1), grid=(1, 1))


def _lose_when(path: Path, index: int) -> None:
    while not path.exists():
        time.sleep(0.01)
    lose(open_device(index))


if __name__ == "__main__":
    wanted = Path(os.environ["LOSE_WHEN"]), int(os.environ["LOSE_GPU"])
    threading.Thread(target=_lose_when, args=wanted, daemon=True).start()
    runpy.run_module("vernier", run_name="__main__", alter_sys=True)
