"""An executor whose answers are arithmetic and whose faults are made to order: y = 2 x, z = x + 1."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np

from vernier.engine.base import ConflictGuard, Executor, Slot, StageTimes
from vernier.errors import EngineError
from vernier.tensors import Arrays, TensorSpec

#: Given the rows of a batch, may raise whatever should happen to it.
Fault = Callable[[np.ndarray], None]


class ArithmeticExecutor(Executor):
    """x [batch, 2] → y = 2 x and z = x + 1, with the precision's mark in z's last column.

    Args:
        spoil: rows where it is True get NaN in y.
        fault: called with every staged batch before it is computed.
        fresh: whether slots return new arrays, or the same memory again and again.
    """

    runtime = "onnxruntime"
    device = "cpu"
    engine_bytes = 1
    load_seconds = 0.0

    def __init__(
        self,
        precision: str = "fp32",
        *,
        exact_batch: bool = True,
        spoil: Callable[[np.ndarray], np.ndarray] | None = None,
        fault: Fault | None = None,
        fresh: bool = True,
        fail_to_open: int = 0,
    ) -> None:
        self.precision = precision
        self.exact_batch = exact_batch
        self.inputs = [TensorSpec("x", "float32", ("batch", 2))]
        self.outputs = [TensorSpec("y", "float32", ("batch", 2)), TensorSpec("z", "float32", ("batch", 2))]
        self.spoil = spoil
        self.fault = fault
        self.fresh = fresh
        self.fail_to_open = fail_to_open
        self.gate = threading.Event()
        self.gate.set()
        self.ran: list[np.ndarray] = []
        self.open_slots = 0
        self.warm = False

    def begin(self) -> None:
        """From now on every execution is recorded, may fail, and waits for the gate."""
        self.ran.clear()
        self.warm = True

    def open_slot(self) -> Slot:
        if self.fail_to_open:
            self.fail_to_open -= 1
            raise EngineError("no memory for another slot")
        self.open_slots += 1
        return ArithmeticSlot(self)

    def close(self) -> None:
        assert self.open_slots == 0, "an executor was closed before its slots"


class ArithmeticSlot(Slot):
    def __init__(self, executor: ArithmeticExecutor) -> None:
        self.fresh_outputs = executor.fresh
        self._executor = executor
        self._memory = np.zeros((1024, 2), np.float32)
        self._results = {name: np.zeros((1024, 2), np.float32) for name in ("y", "z")}
        self._rows = 0
        self._guard = ConflictGuard("a test's slot")
        self._open = True

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        with self._guard:
            self._rows = shapes["x"][0]
            return {"x": self._memory[: self._rows]}

    def run(self) -> Arrays:
        executor = self._executor
        with self._guard:
            x = self._memory[: self._rows]
            if executor.warm:
                executor.ran.append(x.copy())
                assert executor.gate.wait(20)
                if executor.fault is not None:
                    executor.fault(x)
            y, z = 2 * x, x + 1
            z[:, 1] = sum(map(ord, executor.precision))
            if executor.spoil is not None:
                y[executor.spoil(x)] = np.nan
            if executor.fresh:
                return {"y": y, "z": z}
            for name, array in (("y", y), ("z", z)):
                self._results[name][:] = -1.0  # what the last batch left there must not be read any more
                self._results[name][: self._rows] = array
            return {name: memory[: self._rows] for name, memory in self._results.items()}

    @property
    def last_times(self) -> StageTimes:
        return StageTimes(infer=1e-6)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._executor.open_slots -= 1
