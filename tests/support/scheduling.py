"""A real scheduler with real threads around executors whose faults are made to order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np

from tests.support.engines import ArithmeticExecutor
from vernier.border.batch import Answer, RequestBatch, cut
from vernier.engine.base import Executor, default_buckets
from vernier.errors import VernierError
from vernier.metrics import ModelMetrics
from vernier.serving.queueing.admission import Policy
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.queueing.sharing import DeviceScheduler
from vernier.serving.scheduling.scheduler import Scheduler


def x(rows: int = 1, start: float = 0.0) -> dict[str, np.ndarray]:
    return {"x": np.arange(start, start + 2 * rows, dtype=np.float32).reshape(rows, 2)}


def z_of(inputs: dict[str, np.ndarray], precision: str = "fp32") -> np.ndarray:
    z = inputs["x"] + 1
    z[:, 1] = sum(map(ord, precision))
    return z


End = Answer | VernierError


class Sent:
    """The target of a batch, which remembers what it was told.

    Args:
        each: rows of each request; their numbers begin at 0, 100, 200 … in their order, or at `start` and so on.

    Attributes:
        ends: of each request, what it ended with, its own rows of an answer.
        answers: how many requests each answer was for.
        releases: how often the batch was released.
    """

    def __init__(
        self,
        *each: int,
        start: float = 0.0,
        outputs: Sequence[str] = ("y", "z"),
        precision: str | None = None,
        priority: int = 0,
        deadlines: Sequence[float] | None = None,
    ) -> None:
        each = each or (1,)
        self.inputs = [x(rows, start + 100.0 * at) for at, rows in enumerate(each)]
        together = {"x": np.concatenate([inputs["x"] for inputs in self.inputs])}
        arrivals = [0.0] * len(each)
        self.batch = RequestBatch(together, each, outputs, precision, priority, arrivals, deadlines, self)
        self.ends: list[list[End]] = [[] for _ in each]
        self.answers: list[int] = []
        self.releases = 0

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        assert (batch, self.releases) == (self.batch, 0)
        self.answers.append(len(requests))
        rows = [batch.rows[at] for at in requests]
        assert {len(array) for array in answer.outputs.values()} == {sum(rows)}
        for at, outputs in zip(requests, cut(answer.outputs, rows), strict=True):
            self.ends[at].append(replace(answer, outputs=outputs))

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        assert (batch, self.releases) == (self.batch, 0)
        for at in requests:
            self.ends[at].append(error)

    def released(self, batch: RequestBatch) -> None:
        assert batch is self.batch
        self.releases += 1

    @property
    def kinds(self) -> list[type[End] | None]:
        """What each request ended with; None for one that did not, or was cancelled. Each ended once at most."""
        assert max(map(len, self.ends)) <= 1
        return [type(ends[0]) if ends else None for ends in self.ends]

    def answer(self, at: int = 0) -> Answer:
        """The answer to a request, which must have one, and the right one."""
        (answer,) = self.ends[at]
        assert isinstance(answer, Answer)
        if "y" in answer.outputs:
            np.testing.assert_array_equal(answer.outputs["y"], 2 * self.inputs[at]["x"])
        return answer

    def error(self, at: int = 0) -> VernierError:
        (error,) = self.ends[at]
        assert isinstance(error, VernierError)
        return error


async def busy(scheduler: Scheduler, executor: ArithmeticExecutor) -> Sent:
    """A request that keeps the only worker until the executor's gate is set."""
    executor.gate.clear()
    running = Sent()
    scheduler.submit(running.batch)
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
    device: DeviceScheduler | None = None,
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
        device=device,
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
