"""A real scheduler with real threads around executors whose faults are made to order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from tests.support.engines import ArithmeticExecutor
from vernier.engine.base import Executor, default_buckets
from vernier.errors import VernierError
from vernier.metrics import ModelMetrics
from vernier.serving.admission import Policy
from vernier.serving.deference import Deference
from vernier.serving.padding import BatchLayout
from vernier.serving.request import Answer, PendingRequest
from vernier.serving.scheduler import Scheduler
from vernier.serving.sharing import Device


def x(rows: int = 1, start: float = 0.0) -> dict[str, np.ndarray]:
    return {"x": np.arange(start, start + 2 * rows, dtype=np.float32).reshape(rows, 2)}


def z_of(inputs: dict[str, np.ndarray], precision: str = "fp32") -> np.ndarray:
    z = inputs["x"] + 1
    z[:, 1] = sum(map(ord, precision))
    return z


class Recorded(PendingRequest):
    """Remembers how often and with what it ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ends: list[tuple[Answer | None, VernierError | None]] = []

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        self.ends.append((answer, error))


async def busy(scheduler: Scheduler, executor: ArithmeticExecutor) -> Recorded:
    """A request that keeps the only worker until the executor's gate is set."""
    executor.gate.clear()
    running = Recorded(x(), 1)
    scheduler.submit(running)
    await until(lambda: len(executor.ran) == 1)
    return running


@asynccontextmanager
async def serving(
    *executors: Executor,
    precision: str | None = None,
    policy: Policy | None = None,
    slots: int = 1,
    inline: bool = False,
    largest: int = 8,
    device: Device | None = None,
    deference: Deference | None = None,
) -> AsyncIterator[Scheduler]:
    """A started scheduler; at the end everything is drained and every slot closed."""
    first = executors[0]
    layout = BatchLayout("dynamic", default_buckets(largest), first.inputs, first.outputs, "batch")
    metrics = ModelMetrics("m", "1")
    by_precision = {executor.precision: executor for executor in executors}
    scheduler = Scheduler(
        "m",
        layout,
        by_precision,
        precision or first.precision,
        policy or Policy(),
        slots,
        metrics,
        deference=deference,
        inline=inline,
    )
    await scheduler.started()
    parts: Sequence[ArithmeticExecutor] = [part for executor in executors for part in executor.parts]
    for part in parts:
        part.begin()
    try:
        yield scheduler
    finally:
        for part in parts:
            part.gate.set()
        await scheduler.drain(10)
        totals = metrics.totals()
        admitted = totals.pop("admitted")
        assert admitted == sum(totals.values()), "an admitted request ended twice or never"
        assert (scheduler.inflight, scheduler.queued) == (0, 0)
        assert [part.open_slots for part in parts] == [0] * len(parts)
        for executor in executors:
            executor.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is anything
            await asyncio.sleep(0.001)
