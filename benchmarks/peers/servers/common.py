"""What every peer's script needs; imported by file, since the scripts run alone."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime

#: Large enough for every connection of the load.
MAX_BATCH = 64


def arguments() -> tuple[int, str, str]:
    """Port, model and workload."""
    return int(sys.argv[1]), sys.argv[2], sys.argv[3]


class Model:
    """The ONNX model on one thread; for the workload `large`, the last two numbers of each row.

    Args:
        path: the ONNX file.
        workload: see the package.
    """

    def __init__(self, path: str, workload: str) -> None:
        self.width = 3 * 224 * 224 if workload == "large" else 64
        self._session: Any = None
        if workload != "large":
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.inter_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[n, width] float32 to [n, outputs] float32."""
        if self._session is None:
            return x.reshape(len(x), -1)[:, -2:]
        return self._session.run(None, {"x": x})[0]
