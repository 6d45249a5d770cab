"""What a front makes of its engine process: deaths, restarts, and nonsense."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from tests.support.border import EngineModel, EngineSide, FrontSide, arithmetic_manifest, kill
from tests.support.border_engine import ManualScheduler
from tests.support.scheduling import Sent, until
from vernier.border.batch import Answer, RequestBatch
from vernier.border.memory.arena import create_memfd
from vernier.border.records import wire
from vernier.border.records.wire import ArrayPlace
from vernier.errors import (
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineRestarting,
    NotReady,
    UnknownModel,
    UnknownVersion,
    UnsupportedPrecision,
)


class Processes:
    """A front, and one engine process after the other."""

    def __init__(self, queue_limit: int = 20) -> None:
        self.now = 100.0
        self.front = FrontSide(queue_limit=queue_limit, clock=lambda: self.now)
        self.engine: EngineSide | None = None

    def model(self, name: str = "m", factor: float = 2.0, **changes: Any) -> EngineModel:
        scheduler = ManualScheduler(factor, lambda: self.now)
        return EngineModel(arithmetic_manifest(name, **changes), scheduler)

    def start(self, *models: EngineModel, starting: bool = False) -> EngineSide:
        self.engine = EngineSide(*models)
        self.engine.starting = starting
        if starting:
            self.engine.reason = "loading"
        self.front.meet(self.engine)
        return self.engine

    async def kill(self) -> None:
        assert self.engine is not None
        kill(self.front.session)
        self.engine.fronts._sessions.clear()
        self.engine.close()
        self.engine = None
        await until(lambda: not self.front.engine.connected)

    async def resolve(self, name: str = "m") -> Any:
        await until(lambda: self.front.group.not_ready_reason() is None)
        return self.front.group.resolve(name, None)

    async def arrive(self, model: EngineModel, batches: int = 1) -> None:
        await until(lambda: len(model.scheduler.batches) == batches)

    async def running(self, *rows: int) -> tuple[EngineModel, Any, Sent]:
        """A model of a new engine process, what the front has of it, and a batch that it has been sent."""
        model, sent = self.model(), Sent(*rows)
        self.start(model)
        served = await self.resolve()
        served.scheduler.submit(sent.batch)
        await self.arrive(model)
        return model, served, sent

    async def answer_all(self, model: EngineModel) -> None:
        """Runs what comes until nothing does."""
        for _ in range(50):
            execution = model.scheduler.begin()
            if execution is not None:
                model.scheduler.finish(execution)
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        self.front.close()
        if self.engine is not None:
            self.engine.close()
        await asyncio.sleep(0)


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    made = Processes()
    yield made
    await made.close()


async def test_what_waits_outlives_two_engine_processes_that_die_before_they_are_ready(
    processes: Processes,
) -> None:
    _, _, sent = await processes.running(1, 2)
    await processes.kill()
    for _ in range(2):
        processes.start(starting=True)
        late = Sent(1)
        processes.front.group.resolve("m", None).scheduler.submit(late.batch)
        await asyncio.sleep(0.01)
        await processes.kill()
    last = processes.model()
    processes.start(last)
    await processes.arrive(last, 3)
    await processes.answer_all(last)
    assert (sent.kinds, sent.releases) == ([Answer, Answer], 1)
    sent.answer(1)


async def test_the_next_engine_process_counts_its_models_anew(processes: Processes) -> None:
    """What was sent to model 1 goes to the model of that name, though another one bears the number now."""
    old = [processes.model("a"), processes.model("b", factor=3.0)]
    processes.start(*old)
    model = await processes.resolve("a")
    before = Sent()
    model.scheduler.submit(before.batch)
    await processes.kill()
    fresh = processes.model("a"), processes.model("b", factor=3.0)
    engine = processes.start(fresh[1], starting=True)
    during = Sent()
    model.scheduler.submit(during.batch)
    await asyncio.sleep(0.01)
    model.scheduler.submit(Sent().batch)  # resolved long ago
    assert not fresh[1].scheduler.batches
    engine.models.insert(0, fresh[0])
    engine.starting, engine.reason = False, None
    engine.fronts.publish()
    await processes.arrive(fresh[0], 3)
    await processes.answer_all(fresh[0])
    for sent in (before, during):
        np.testing.assert_array_equal(sent.answer().outputs["y"], 2 * sent.inputs[0]["x"])


async def test_a_model_that_did_not_come_back_is_told_and_forgotten(processes: Processes) -> None:
    processes.start(processes.model("a"), processes.model("b"))
    model = await processes.resolve("a")
    await processes.kill()
    sent = Sent()
    model.scheduler.submit(sent.batch)
    engine = processes.start(starting=True)
    await until(lambda: "being restarted" not in str(processes.front.group.not_ready_reason()))
    assert [found.name for found in processes.front.group.models()] == ["a", "b"]
    engine.models.append(processes.model("b"))
    engine.starting, engine.reason = False, None
    engine.fronts.publish()
    await until(lambda: sent.kinds == [UnknownVersion])
    assert sent.releases == 1
    with pytest.raises(UnknownModel):
        processes.front.group.resolve("a", None)
    assert {name for name, _ in processes.front.metrics._models} == {"b"}
    late = Sent()
    model.scheduler.submit(late.batch)
    assert (late.kinds, late.releases) == ([Draining], 1)


async def test_a_variant_that_did_not_come_back_costs_the_others_nothing(processes: Processes) -> None:
    first = processes.model()
    first.precisions = ("fp32", "int8")
    processes.start(first)
    model = await processes.resolve()
    await processes.kill()
    reduced, plain = Sent(precision="int8"), Sent()
    model.scheduler.submit(reduced.batch)
    model.scheduler.submit(plain.batch)
    last = processes.model()
    last.scheduler.submit = _refusing(last.scheduler)  # type: ignore[method-assign]
    processes.start(last)
    await processes.arrive(last)
    await processes.answer_all(last)
    assert (reduced.kinds, reduced.releases) == ([UnsupportedPrecision], 1)
    assert (plain.kinds, plain.releases) == ([Answer], 1)


def _refusing(scheduler: ManualScheduler) -> Callable[[RequestBatch], None]:
    submit = scheduler.submit

    def refuse(batch: RequestBatch) -> None:
        if batch.precision is None:
            submit(batch)
            return
        batch.target.failed(batch, range(len(batch)), UnsupportedPrecision("not loaded"))
        batch.target.released(batch)

    return refuse


async def test_a_request_without_a_batch_axis_gets_its_whole_answer_at_the_second_try(
    processes: Processes,
) -> None:
    shape = [{"name": "x", "dtype": "float32", "shape": [4, 2]}]
    changes: dict[str, Any] = {
        "inputs": shape,
        "outputs": [{"name": n, "dtype": "float32", "shape": [4, 2]} for n in ("y", "z")],
        "dims": {},
        "batching": {"kind": "none"},
    }
    first, second = processes.model(**changes), processes.model(**changes)
    processes.start(first)
    model = await processes.resolve()
    sent = Sent(1)
    whole = np.arange(8, dtype=np.float32).reshape(4, 2)
    sent.batch.inputs["x"] = whole
    answers: list[Answer] = []
    sent.answered = lambda batch, requests, answer: answers.append(answer)  # type: ignore[method-assign]
    model.scheduler.submit(sent.batch)
    await processes.arrive(first)
    first.scheduler.begin()
    await processes.kill()
    processes.start(second)
    await processes.arrive(second)
    (batch,) = second.scheduler.batches
    np.testing.assert_array_equal(batch.inputs["x"], whole)
    outputs = {"y": 2 * whole, "z": whole}
    batch.target.answered(batch, range(1), Answer(outputs, "fp32", 0, 0, 1))
    await until(lambda: len(answers) == 1)
    np.testing.assert_array_equal(answers[0].outputs["y"], 2 * whole)
    second.scheduler.cancel(batch, 0)
    await until(lambda: sent.releases == 1)


async def test_what_is_held_expires_is_cancelled_and_is_bounded(processes: Processes) -> None:
    processes.start(processes.model())
    model = await processes.resolve()
    await processes.kill()
    late, cancelled, kept = Sent(2, 3, deadlines=[110.0, 1e9]), Sent(5, 5), Sent(5)
    for one in (late, cancelled, kept):
        model.scheduler.submit(one.batch)
    full = Sent(1)
    model.scheduler.submit(full.batch)
    assert (full.kinds, full.releases) == ([EngineRestarting], 1)
    assert isinstance(model.scheduler.refusal(), EngineRestarting)
    for at in (0, 1, 1):
        model.scheduler.cancel(cancelled.batch, at)
    assert (cancelled.kinds, cancelled.releases) == ([None, None], 1)
    assert model.scheduler.refusal() is None
    processes.now = 111.0
    await until(lambda: late.kinds == [DeadlineExceeded, None])
    assert processes.front.engine._held.rows == 8
    last = processes.model()
    processes.start(last)
    await processes.arrive(last, 2)
    await processes.answer_all(last)
    assert (late.kinds, late.releases) == ([DeadlineExceeded, Answer], 1)
    late.answer(1)
    assert kept.kinds == [Answer]
    totals = model.metrics.totals()
    assert totals["admitted"] == sum(totals.values()) - totals["admitted"] == 4


async def test_the_end_of_a_front_fails_and_releases_what_is_open(processes: Processes) -> None:
    first, _, sent = await processes.running(1, 1)
    processes.front.group.close()
    assert (sent.kinds, sent.releases) == ([Draining, Draining], 1)
    await until(lambda: not first.scheduler.batches)


async def test_calls_end_with_the_engine_process(processes: Processes) -> None:
    processes.start(processes.model())
    await processes.resolve()
    call = asyncio.create_task(processes.front.group.load("m", 1))
    assert (await call).name == "m"
    call = asyncio.create_task(processes.front.group.unload("m"))
    await asyncio.sleep(0)
    await processes.kill()
    with pytest.raises(EngineRestarting):
        await call
    with pytest.raises(EngineRestarting):
        await processes.front.group.load("m")


# --- nonsense -----------------------------------------------------------------------------------------
def _answered(rows: int, number: int = 1, offset: int = 0) -> bytes:
    arrays = [np.zeros((rows, 2), np.float32)] * 2
    places = [ArrayPlace(0, offset)] * 2
    return wire.write_answered(5, number, range(2), Answer({}, "fp32", 0, 0, 1), arrays, places)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xff",
        bytes([wire.ANSWERED]),
        _answered(3),
        _answered(2, offset=2**40),
        wire.write_answered(5, 1, range(1, 9), Answer({}, "fp32", 0, 0, 1), [], []),
        wire.write_answered(5, 1, range(2), Answer({}, "fp32", 0, 0, 1), [], []),
        wire.write_answered(
            5, 1, range(2), Answer({}, "fp32", 0, 0, 1), [np.zeros((2, 2))] * 2, [ArrayPlace(3, 0)] * 2
        ),
        wire.write_failed(1, [0, 7], NotReady("")),
        bytes([wire.FAILED]) + bytes(20),
        wire.write_json({"type": "catalogue"}),
        wire.write_json(
            {"type": "catalogue", "models": [{}], "awaited": {}, "reason": None, "starting": False}
        ),
        wire.write_json({"type": "result", "call": 99}),
        wire.write_json({}),
        wire.write_released(99),
        wire.write_admitted(99),
        _answered(2, number=99),
    ],
    ids=range(17),
)
async def test_an_engine_process_that_sends_nonsense_costs_at_most_the_request_that_it_is_about(
    processes: Processes, record: bytes
) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    first, _, sent = await processes.running(1, 1)
    fd = create_memfd("test", 8)
    processes.front.session._channel.write(record, (fd,))
    await asyncio.sleep(0.005)
    assert sent.kinds == [None, None]
    await processes.answer_all(first)
    assert (sent.kinds, sent.releases) == ([Answer, Answer], 1)
    sent.answer(1)
    sent.ends.clear()
    await until(lambda: not processes.front.session._unread)


async def test_a_request_that_the_engine_process_forgets_is_told(processes: Processes) -> None:
    first, _, sent = await processes.running(1, 1)
    processes.front.session._channel.write(wire.write_released(1))
    await until(lambda: sent.releases == 1)
    assert sent.kinds == [EngineError, EngineError]
    await processes.answer_all(first)


async def test_an_engine_process_without_memory_for_what_it_shares_is_left(processes: Processes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = __import__("socket").socketpair()
    theirs.close()
    with pytest.raises(ValueError):
        processes.front.engine.attach(ours, *[create_memfd("empty", 0) for _ in range(3)])
    assert len(os.listdir("/proc/self/fd")) == before
    assert not processes.front.engine.connected
