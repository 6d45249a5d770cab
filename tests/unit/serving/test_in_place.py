"""A request that is a batch runs from the memory in which it was received, which is used again when nobody keeps it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.support.packages import ends_model
from tests.support.scheduling import until
from vernier.border.batch import Answer, RequestBatch, cut
from vernier.engine.base import default_buckets
from vernier.engine.ort import OnnxRuntimeExecutor, OnnxRuntimeSlot
from vernier.errors import VernierError
from vernier.front.buffers import BodyBufferPool
from vernier.metrics import ModelMetrics
from vernier.serving.queueing.admission import Policy
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.scheduling.scheduler import Scheduler
from vernier.tensors import Arrays

WIDTH = 100_000


@asynccontextmanager
async def images(folder: Path, inline: bool) -> AsyncIterator[Scheduler]:
    """A scheduler of rows of 400 KB on ONNX Runtime."""
    path = folder / "ends.onnx"
    onnx.save(ends_model(WIDTH), path)
    executor = OnnxRuntimeExecutor(path, precision="fp32", intra_op_threads=1)
    layout = BatchLayout("dynamic", default_buckets(8), executor.inputs, executor.outputs, "batch")
    scheduler = Scheduler(
        "m", layout, {"fp32": executor}, "fp32", Policy(), 1, ModelMetrics("m", "1"), inline=inline
    )
    await scheduler.started()
    try:
        yield scheduler
    finally:
        await scheduler.drain(10)
        executor.close()


def received(memory: BodyBufferPool, number: float) -> Arrays:
    """A row as the receiver would have it: an array over memory out of the pool."""
    room = memory.take(0, 4 * WIDTH, several=False).view
    np.frombuffer(room, np.float32)[:] = number
    return {"x": np.ndarray((1, WIDTH), np.float32, room.toreadonly())}


class Released:
    """A target that knows what has been released."""

    def __init__(self) -> None:
        self.batches: list[RequestBatch] = []

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        raise AssertionError("a cancelled request was answered")

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        raise AssertionError("a cancelled request failed")

    def released(self, batch: RequestBatch) -> None:
        self.batches.append(batch)


def place(inputs: Arrays) -> int:
    return int(inputs["x"].ctypes.data)


@pytest.mark.parametrize("inline", [False, True])
async def test_memory_is_free_once_the_answer_is_there(tmp_path: Path, inline: bool) -> None:
    memory = BodyBufferPool(10 * 4 * WIDTH)
    async with images(tmp_path, inline) as scheduler:
        where = place(received(memory, 0.0))
        for number in range(4):
            inputs = received(memory, number)
            assert place(inputs) == where
            outputs = (await scheduler.predict(inputs, rows=1)).outputs
            del inputs

            def free() -> bool:
                return (
                    place(received(memory, -1.0)) == where
                )  # a worker lets go a moment after it has answered

            await until(free)
            np.testing.assert_array_equal(outputs["z"], np.full((1, 3), 2.0 * number))


@pytest.mark.parametrize("inline", [False, True])
async def test_what_the_tap_keeps_is_not_written_over(tmp_path: Path, inline: bool) -> None:
    memory = BodyBufferPool(10 * 4 * WIDTH)
    kept: list[tuple[Arrays, Arrays]] = []
    async with images(tmp_path, inline) as scheduler:
        scheduler.set_tap(lambda inputs, outputs, precision: kept.append((inputs, outputs)), 0.5)
        for number in range(8):
            await scheduler.predict(received(memory, number), rows=1)
    assert len(kept) == 4
    assert len({place(inputs) for inputs, _ in kept}) == 4
    for inputs, outputs in kept:
        assert (inputs["x"] == inputs["x"][0, 0]).all()
        np.testing.assert_array_equal(outputs["z"], 2 * inputs["x"][:, :3])


async def test_what_is_cancelled_while_it_runs_is_not_written_over(tmp_path: Path) -> None:
    """Whoever cancels lets go of the request; the execution does not."""
    memory = BodyBufferPool(10 * 4 * WIDTH)
    async with images(tmp_path, inline=False) as scheduler:
        ran: list[Arrays] = []
        read = OnnxRuntimeSlot.read_in_place

        def watched(slot: OnnxRuntimeSlot, inputs: Arrays) -> None:
            read(slot, inputs)
            ran.append({"x": inputs["x"].copy()})
            began.set()
            assert go_on.wait(20)
            ran.append({"x": inputs["x"].copy()})

        began, go_on = threading.Event(), threading.Event()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OnnxRuntimeSlot, "read_in_place", watched)
            target = Released()
            batch = RequestBatch(received(memory, 5.0), [1], ["z"], None, 0, [0.0], None, target)
            scheduler.submit(batch)
            await asyncio.to_thread(began.wait, 20)
            scheduler.cancel(batch, 0)
            assert target.batches == []
            del batch
            others = [received(memory, 6.0) for _ in range(3)]
            go_on.set()
            await until(lambda: len(ran) == 2)
            await until(lambda: len(target.batches) == 1)
        assert len(others) == 3
        np.testing.assert_array_equal(ran[0]["x"], ran[1]["x"])


@pytest.mark.parametrize("inline", [False, True])
async def test_rows_of_a_batch_that_fill_an_execution_are_read_where_they_lie(
    tmp_path: Path, inline: bool
) -> None:
    """Requests of a batch that takes several executions; a request that is run in several, too."""
    read_in_place = OnnxRuntimeSlot.read_in_place
    places: list[tuple[int, int]] = []

    def watched(slot: OnnxRuntimeSlot, inputs: Arrays) -> None:
        places.append((place(inputs), len(inputs["x"])))
        read_in_place(slot, inputs)

    class Kept(Released):
        def __init__(self) -> None:
            super().__init__()
            self.outputs: dict[int, Arrays] = {}

        def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
            self.outputs |= zip(
                requests, cut(answer.outputs, batch.rows[requests.start : requests.stop]), strict=True
            )

    async with images(tmp_path, inline) as scheduler:
        rows = [1, 3, 4, 9, 2]
        x = np.repeat(np.arange(19, dtype=np.float32)[:, None], WIDTH, axis=1)
        target = Kept()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OnnxRuntimeSlot, "read_in_place", watched)
            scheduler.submit(RequestBatch({"x": x}, rows, ["z"], None, 0, [0.0] * 5, None, target))
            await until(lambda: bool(target.batches))
        first = int(x.ctypes.data)
        assert (first, 8) in places
        assert all((where - first) % (4 * WIDTH) == 0 for where, _ in places)
        for at, start in enumerate((0, 1, 4, 8, 17)):
            np.testing.assert_array_equal(target.outputs[at]["z"], 2 * x[start : start + rows[at], :3])
