"""The engine side: catalogues and their acknowledgements, models that leave, fronts that die, and nonsense."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from tests.support.border import EngineModel, EngineSide, FrontSide, arithmetic_manifest, kill, stall
from tests.support.border_engine import ManualScheduler
from tests.support.scheduling import Sent, until
from vernier.border.engine_side import serving_fronts
from vernier.border.memory.arena import create_memfd
from vernier.border.records import wire
from vernier.errors import DeadlineExceeded, Draining, EngineError, LoadRefused


def make_model(name: str = "m", **changes: Any) -> EngineModel:
    loop = asyncio.get_running_loop()
    return EngineModel(arithmetic_manifest(name, **changes), ManualScheduler(2.0, loop.time))


@pytest.fixture
async def engine() -> AsyncIterator[EngineSide]:
    made = EngineSide(make_model())
    yield made
    made.close()
    await asyncio.sleep(0)


@pytest.fixture
async def fronts(engine: EngineSide) -> AsyncIterator[list[FrontSide]]:
    made = [FrontSide(), FrontSide()]
    for front in made:
        front.meet(engine)
        await until(lambda front=front: bool(front.group.models()))
    yield made
    for front in made:
        front.close()
    await asyncio.sleep(0)


def names(front: FrontSide) -> list[str]:
    return [model.name for model in front.group.models()]


async def test_a_front_that_joins_while_the_catalogue_changes_costs_the_others_no_news(
    engine: EngineSide, fronts: list[FrontSide]
) -> None:
    engine.models.append(make_model("other"))
    late = FrontSide()
    late.meet(engine)
    for front in (*fronts, late):
        await until(lambda front=front: names(front) == ["m", "other"])
    late.close()


async def test_what_has_not_changed_is_not_told_again(engine: EngineSide, fronts: list[FrontSide]) -> None:
    generation = engine.fronts._generation
    for _ in range(3):
        engine.fronts.publish()
    assert engine.fronts._generation == generation
    engine.reason = "sick"
    engine.fronts.publish()
    await until(lambda: fronts[1].group.not_ready_reason() == "sick")


@pytest.mark.parametrize("count", [1, 400])
async def test_a_catalogue_of_any_size(engine: EngineSide, fronts: list[FrontSide], count: int) -> None:
    engine.models += [make_model(f"model-{n:03}") for n in range(count)]
    engine.fronts.publish()
    for front in fronts:
        await until(lambda front=front: len(names(front)) == count + 1)
    await until(lambda: all(front.session.taken == engine.fronts._generation for front in fronts))


async def test_a_model_leaves_when_nothing_can_be_on_its_way_to_it(
    engine: EngineSide, fronts: list[FrontSide]
) -> None:
    leaving = engine.models.pop()
    go_on = stall(fronts[0].engine._channel)
    sent = Sent(1)
    fronts[0].group.resolve("m", None).scheduler.submit(sent.batch)
    retiring = asyncio.create_task(engine.fronts.retire(leaving))
    await until(lambda: fronts[1].session.taken == engine.fronts._generation)
    await until(lambda: len(leaving.scheduler.batches) == 1)
    late = FrontSide()
    late.meet(engine)  # a front that knows nothing of the model must acknowledge all the same
    await until(lambda: late.session.taken == engine.fronts._generation)
    assert not retiring.done()
    go_on()
    await asyncio.wait_for(retiring, 2)
    leaving.scheduler.finish(leaving.scheduler.begin())
    await until(lambda: sent.releases == 1)
    sent.answer()
    late.close()


async def test_a_front_that_dies_is_not_waited_for(engine: EngineSide, fronts: list[FrontSide]) -> None:
    go_on = stall(fronts[0].engine._channel)
    leaving = engine.models.pop()
    retiring = asyncio.create_task(engine.fronts.retire(leaving))
    await asyncio.sleep(0.02)
    assert not retiring.done()
    kill(fronts[0].engine)  # type: ignore[arg-type]
    await asyncio.wait_for(retiring, 2)
    go_on()


async def test_a_front_that_does_not_acknowledge_is_told_that_the_model_is_gone(
    engine: EngineSide, fronts: list[FrontSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_fronts, "_ACKNOWLEDGE_S", 0.05)
    go_on = stall(fronts[0].engine._channel)
    model = fronts[0].group.resolve("m", None)
    await engine.fronts.retire(engine.models.pop())
    sent = Sent(1, 1)
    model.scheduler.submit(sent.batch)
    go_on()
    await until(lambda: sent.releases == 1)
    assert sent.kinds == [Draining, Draining]


async def test_a_reloaded_model_takes_what_was_meant_for_the_one_before(
    engine: EngineSide, fronts: list[FrontSide]
) -> None:
    old = fronts[0].group.resolve("m", None)
    leaving = engine.models.pop()
    engine.models.append(make_model())
    await engine.fronts.retire(leaving)
    sent = Sent(1)
    old.scheduler.submit(sent.batch)
    fresh = engine.models[0].scheduler
    await until(lambda: bool(fresh.batches))
    fresh.finish(fresh.begin())
    await until(lambda: sent.releases == 1)
    sent.answer()


async def test_models_are_told_apart_though_memory_is_used_again(
    engine: EngineSide, fronts: list[FrontSide]
) -> None:
    """A model may lie where a retired one lay, and have its identity."""
    seen = set()
    for _ in range(30):
        leaving = engine.models.pop()
        engine.models.append(make_model())
        await engine.fronts.retire(leaving)
        del leaving
        gc.collect()
        (entry,) = engine.fronts._told["models"]
        assert entry["number"] not in seen
        seen.add(entry["number"])
        assert engine.fronts.model(entry["number"]) is engine.models[0]
    assert len(engine.fronts._models) == len(engine.fronts._number) == 1


async def test_nobody_waits_for_the_requests_of_a_dead_front(
    engine: EngineSide, fronts: list[FrontSide]
) -> None:
    scheduler = engine.models[0].scheduler
    running, waiting = Sent(1, 1), Sent(3)
    model = fronts[0].group.resolve("m", None)
    for one in (running, waiting):
        model.scheduler.submit(one.batch)
    await until(lambda: len(scheduler.batches) == 2)
    execution = scheduler.begin()
    kill(fronts[0].engine)  # type: ignore[arg-type]
    await until(lambda: len(scheduler.batches) == 1)
    assert fronts[0].session not in engine.fronts._sessions
    scheduler.finish(execution)
    assert not scheduler.batches
    assert fronts[0].session._running.numbers() == set()
    other = Sent(1)
    fronts[1].group.resolve("m", None).scheduler.submit(other.batch)
    await until(lambda: bool(scheduler.batches))
    scheduler.finish(scheduler.begin())
    await until(lambda: other.releases == 1)


async def test_calls_are_answered_with_what_they_raise(
    engine: EngineSide, fronts: list[FrontSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(message: dict[str, Any]) -> dict[str, Any]:
        raise LoadRefused("damaged") if message["name"] == "m" else ZeroDivisionError

    monkeypatch.setattr(engine.fronts, "call", refuse)
    with pytest.raises(LoadRefused, match="damaged"):
        await fronts[0].group.load("m")
    with pytest.raises(EngineError):
        await fronts[0].group.load("other")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [2, 2]},
        {"rows": [0, 1]},
        {"outputs": [7]},
        {"outputs": []},
        {"arrays": []},
        {"places": [wire.ArrayPlace(0, 2**40)]},
        {"places": [wire.ArrayPlace(2, 0)]},
        {"model": 9},
        {"arrays": [np.zeros((2, 2), np.float64)]},
        {"arrays": [np.zeros((2, 1, 2), np.float32)]},
        {"arrays": [np.zeros((), np.float32)]},
        {"last_try": True},
    ],
    ids=str,
)
async def test_a_submission_that_makes_no_sense_ends_all_the_same(
    engine: EngineSide, fronts: list[FrontSide], change: dict[str, Any]
) -> None:
    """Its front is told, and may use the memory again."""
    sent = Sent(1, 1)
    front = fronts[0].group
    write = wire.write_submission

    def written(*args: Any) -> bytes:
        keys = list(inspect.signature(write).parameters)
        return write(**{**dict(zip(keys, args, strict=True)), **change})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "write_submission", written)
        front.resolve("m", None).scheduler.submit(sent.batch)
    await until(lambda: sent.releases == 1)
    assert set(sent.kinds) <= {EngineError, Draining}
    assert fronts[0].session._batches == {}
    assert front.open_requests == 0


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\0",
        bytes([wire.SUBMIT]),
        wire.write_cancel(99, 0),
        wire.write_cancel(1, 99),
        wire.write_consumed([77]),
        wire.write_released(1),
        wire.write_json({"type": "taken"}),
        wire.write_json({"type": "load", "call": "x"}),
        bytes([wire.JSON]) + b"{",
    ],
    ids=range(10),
)
async def test_a_front_that_sends_nonsense_costs_nobody_anything(
    engine: EngineSide, fronts: list[FrontSide], record: bytes
) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
    scheduler = engine.models[0].scheduler
    sent = Sent(1, 1)
    fronts[0].group.resolve("m", None).scheduler.submit(sent.batch)
    await until(lambda: bool(scheduler.batches))
    fronts[0].engine._channel.write(record, (create_memfd("test", 8),))
    await asyncio.sleep(0.005)
    scheduler.finish(scheduler.begin())
    await until(lambda: sent.releases == 1)
    sent.answer(1)


async def test_an_answer_for_which_there_is_no_memory_is_told_as_a_failure(
    engine: EngineSide, fronts: list[FrontSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engine.models[0].scheduler
    sent = Sent(1, 1)
    fronts[0].group.resolve("m", None).scheduler.submit(sent.batch)
    await until(lambda: bool(scheduler.batches))
    hoard = fronts[0].session._arena.take(4 * 2**20), fronts[0].session._arena.take(4 * 2**20)
    hoard += fronts[0].session._arena.take(4 * 2**20), fronts[0].session._arena.take(4 * 2**20)

    def exhausted(*args: Any) -> int:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(os, "memfd_create", exhausted)
    scheduler.finish(scheduler.begin())
    await until(lambda: sent.releases == 1)
    assert sent.kinds == [EngineError, EngineError]
    del hoard


async def test_a_scheduler_that_faults_costs_only_what_it_was_given(
    engine: EngineSide, fronts: list[FrontSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Sent(1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine.models[0].scheduler, "on_submit", lambda batch: 1 / 0)
        fronts[0].group.resolve("m", None).scheduler.submit(sent.batch)
        await until(lambda: sent.releases == 1)
    assert sent.kinds == [EngineError, EngineError]


# --- last tries ---------------------------------------------------------------------------------------
async def running_when_it_died(front: FrontSide, *sent: Sent) -> EngineSide:
    """Submits, has everything run, kills the engine process, and starts another one."""
    first = EngineSide(make_model())
    front.meet(first)
    await until(lambda: front.group.not_ready_reason() is None)
    for one in sent:
        front.group.resolve("m", None).scheduler.submit(one.batch)
    scheduler = first.models[0].scheduler
    await until(lambda: len(scheduler.batches) == len(sent))
    while scheduler.begin() is not None:
        pass
    kill(front.session)
    first.fronts._sessions.clear()
    first.close()
    await until(lambda: not front.engine.connected)
    second = EngineSide(make_model())
    front.meet(second)
    await until(lambda: bool(second.models[0].scheduler.batches))
    return second


async def test_what_ran_when_the_engine_process_died_runs_again_one_after_the_other() -> None:
    front = FrontSide()
    sent = Sent(1, 2), Sent(3)
    engine = await running_when_it_died(front, *sent)
    scheduler = engine.models[0].scheduler
    for _ in range(3):
        await asyncio.sleep(0.005)
        (batch,) = scheduler.batches
        assert len(batch) == 1
        scheduler.finish(scheduler.begin())
    await until(lambda: all(one.releases for one in sent))
    for one in sent:
        assert one.releases == 1
        for at in range(len(one.ends)):
            one.answer(at)
    front.close()
    engine.close()


async def test_a_last_try_that_waits_can_be_cancelled_and_expires() -> None:
    front = FrontSide()
    now = asyncio.get_running_loop().time()
    sent = Sent(1), Sent(1), Sent(1, deadlines=[now + 0.3]), Sent(1)
    engine = await running_when_it_died(front, *sent)
    scheduler = engine.models[0].scheduler
    sent[1].batch.state.cancel(0)
    await until(lambda: sent[1].releases == 1)
    await until(lambda: sent[2].kinds == [DeadlineExceeded])
    assert len(scheduler.batches) == 1
    for at in (0, 3):
        await until(lambda: bool(scheduler.waiting))
        scheduler.finish(scheduler.begin())
        await until(lambda at=at: sent[at].releases == 1)
        sent[at].answer()
    front.close()
    engine.close()
