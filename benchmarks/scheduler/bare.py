"""The bare ONNX Runtime session: what a batch costs when there is nothing around it."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.load.run import pin
from benchmarks.scheduler.models import FEATURES


class BareSession:
    """A session in a process of its own on one core, with one thread. A context manager."""

    def __init__(self, model: Path, core: int) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_open, initargs=(str(model), core)
        )

    def seconds(self, rows: int, seconds: float) -> float:
        """Median seconds of one run at a batch of `rows`, over so long a time."""
        return self._pool.submit(_time, rows, seconds).result()

    def __enter__(self) -> BareSession:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


_session: Any = None


def _open(model: str, core: int) -> None:
    pin(core)
    import onnxruntime

    global _session
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    _session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _time(rows: int, seconds: float) -> float:
    x = np.random.default_rng(1).standard_normal((rows, FEATURES)).astype(np.float32)
    for _ in range(3):
        _session.run(None, {"x": x})
    times = []
    end = perf_counter() + seconds
    while perf_counter() < end:
        began = perf_counter()
        _session.run(None, {"x": x})
        times.append(perf_counter() - began)
    return median(times)
