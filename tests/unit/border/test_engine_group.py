"""A front with several engine processes: which one gets a batch, and what becomes of it when that one dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.border import EngineModel, EngineSide, FrontSide, arithmetic_manifest, kill
from tests.support.border_engine import ManualScheduler
from tests.support.scheduling import Sent, until
from vernier.border.batch import Answer
from vernier.border.engine_side.front_session import FrontSession
from vernier.border.front_side import remote
from vernier.errors import EngineError, EngineRestarting, LoadRefused, QueueFull, UnknownModel


class Pair:
    """A front and two engine processes, each with the models that it is given."""

    def __init__(self) -> None:
        self.now = 100.0
        self.front = FrontSide(queue_limit=20, clock=lambda: self.now, engines=2)
        self.group = self.front.group
        self.engines: list[EngineSide | None] = [None, None]
        self.sessions: list[FrontSession | None] = [None, None]

    def model(self, version: int = 1, factor: float = 2.0, **options: Any) -> EngineModel:
        scheduler = ManualScheduler(factor, lambda: self.now, **options)
        manifest = arithmetic_manifest("m", version)
        return EngineModel(manifest, scheduler, tuple(options.get("precisions", ("fp32",))))

    def start(self, number: int, *models: EngineModel) -> EngineSide:
        side = self.engines[number] = EngineSide(*models)
        self.sessions[number] = self.front.meet(side, number=number)
        return side

    async def both(self, **options: Any) -> tuple[EngineModel, EngineModel]:
        models = self.model(**options), self.model(**options)
        for number, model in enumerate(models):
            self.start(number, model)
        await until(lambda: self.group.not_ready_reason() is None)
        return models

    async def kill(self, number: int) -> None:
        side, session = self.engines[number], self.sessions[number]
        assert side is not None
        assert session is not None
        kill(session)
        side.fronts._sessions.clear()
        side.close()
        self.engines[number] = None
        await until(lambda: not self.group.engines[number].connected)

    def submit(self, *each: int, **options: Any) -> Sent:
        sent = Sent(*each, **options)
        self.group.resolve("m", None).scheduler.submit(sent.batch)
        return sent

    def close(self) -> None:
        self.front.close()
        for side in self.engines:
            if side is not None:
                side.close()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    yield made
    made.close()
    await asyncio.sleep(0)


def finish(model: EngineModel) -> None:
    scheduler = model.scheduler
    while execution := scheduler.begin():
        scheduler.finish(execution)


async def arrive(model: EngineModel, batches: int = 1) -> None:
    await until(lambda: len(model.scheduler.batches) == batches)


async def test_batches_go_to_the_engine_process_that_has_the_fewest_rows(pair: Pair) -> None:
    first, second = await pair.both()
    sent = [pair.submit(2, 1), pair.submit(1), pair.submit(1), pair.submit(1)]
    await arrive(first)
    await arrive(second, 3)
    finish(second)
    await until(lambda: all(one.releases for one in sent[1:]))
    assert pair.group.engines[1].open_rows == 0
    sent.append(pair.submit(1))
    await arrive(second)
    finish(first)
    finish(second)
    await until(lambda: all(one.releases for one in sent))
    for one in sent:
        for at in range(len(one.ends)):
            one.answer(at)
    assert [engine.open_rows for engine in pair.group.engines] == [0, 0]


async def test_one_with_a_full_queue_gets_nothing_and_when_both_are_full_clients_are_told(pair: Pair) -> None:
    first, second = await pair.both(queue_limit=2)
    model = pair.group.resolve("m", None)
    sent = [pair.submit(1) for _ in range(4)]
    await arrive(first, 2)
    await arrive(second, 2)
    await until(lambda: isinstance(model.scheduler.refusal(), QueueFull))
    finish(second)
    await until(lambda: model.scheduler.refusal() is None)
    sent += [pair.submit(1), pair.submit(1)]
    await arrive(second, 2)
    finish(first)
    finish(second)
    await until(lambda: all(one.kinds == [Answer] for one in sent))


async def test_a_precision_that_one_alone_has_goes_there(pair: Pair) -> None:
    first, second = pair.model(), pair.model(precisions=("fp16", "fp32"))
    pair.start(0, first)
    pair.start(1, second)
    await until(lambda: pair.group.not_ready_reason() is None)
    assert pair.group.resolve("m", None).precisions == ("fp32", "fp16")
    sent = [pair.submit(1, precision="fp16") for _ in range(3)]
    await arrive(second, 3)
    assert not first.scheduler.batches
    finish(second)
    await until(lambda: all(one.answer().precision == "fp16" for one in sent if one.releases))


async def test_what_waited_for_one_that_dies_is_the_others(pair: Pair) -> None:
    first, second = await pair.both()
    sent, other = pair.submit(1, 2), pair.submit(1)
    cancelled = pair.submit(1)
    await arrive(first)
    await arrive(second, 2)
    await pair.kill(0)
    await arrive(second, 3)
    cancelled.batch.state.cancel(0)
    assert pair.group.not_ready_reason() is None
    finish(second)
    await until(lambda: (sent.releases, other.releases, cancelled.releases) == (1, 1, 1))
    assert sent.kinds == [Answer, Answer]
    assert cancelled.kinds == [None]
    finish(second)
    again = pair.model()
    pair.start(0, again)
    await until(lambda: pair.group.engines[0].catalogue.reason is None)
    later = [pair.submit(1), pair.submit(1)]
    await arrive(again)
    await arrive(second)
    finish(again)
    finish(second)
    await until(lambda: all(one.releases for one in later))
    totals = pair.group.resolve("m", None).metrics.totals()
    assert totals["admitted"] == 6
    assert (totals["answered"], totals["cancelled"]) == (5, 1)


async def test_what_may_have_killed_one_waits_for_it_and_goes_to_the_other_when_it_stays_away(
    pair: Pair,
) -> None:
    first, second = await pair.both()
    suspect = pair.submit(1)
    await arrive(first)
    first.scheduler.begin()
    await asyncio.sleep(0.01)
    await pair.kill(0)
    await asyncio.sleep(0.05)
    assert not second.scheduler.batches
    pair.now += remote._SUSPECTS_WAIT_S
    await arrive(second)
    finish(second)
    await until(lambda: suspect.releases == 1)
    suspect.answer()


async def test_a_request_that_kills_both_is_told(pair: Pair) -> None:
    first, second = await pair.both()
    poison = pair.submit(1)
    await arrive(first)
    first.scheduler.begin()
    await asyncio.sleep(0.01)
    await pair.kill(0)
    pair.now += remote._SUSPECTS_WAIT_S
    await arrive(second)
    second.scheduler.begin()
    await asyncio.sleep(0.01)
    await pair.kill(1)
    third = pair.model()
    pair.start(0, third)
    await until(lambda: poison.releases == 1)
    assert poison.kinds == [EngineError]
    assert not third.scheduler.batches


async def test_without_any_what_comes_is_held_for_the_first_that_is_back(pair: Pair) -> None:
    await pair.both()
    await pair.kill(0)
    await pair.kill(1)
    assert "restarted" in str(pair.group.not_ready_reason())
    held = [pair.submit(1) for _ in range(3)]
    fresh = pair.model()
    pair.start(1, fresh)
    await arrive(fresh, 3)
    finish(fresh)
    await until(lambda: all(one.kinds == [Answer] for one in held))


async def test_the_default_version_is_the_newest_that_all_have(pair: Pair) -> None:
    old = pair.model(1), pair.model(1)
    new = pair.model(2), pair.model(2)
    sides = [pair.start(0, old[0]), pair.start(1, old[1])]
    await until(lambda: pair.group.not_ready_reason() is None)
    sides[0].models.append(new[0])
    sides[0].fronts.publish()
    await until(lambda: len(pair.group.models()) == 2)
    assert pair.group.resolve("m", None).version == "1"
    pinned = Sent(1)
    pair.group.resolve("m", "2").scheduler.submit(pinned.batch)
    await arrive(new[0])
    sides[1].models.append(new[1])
    sides[1].fronts.publish()
    await until(lambda: pair.group.resolve("m", None).version == "2")
    finish(new[0])
    await until(lambda: pinned.releases == 1)


async def test_a_model_keeps_its_identity_through_the_death_of_one(pair: Pair) -> None:
    """What fronts know of a model's requests is kept by it."""
    _, second = await pair.both()
    model = pair.group.resolve("m", None)
    await pair.kill(0)
    assert pair.group.resolve("m", None) is model
    pair.start(0, pair.model())
    await until(lambda: pair.group.engines[0].catalogue.reason is None)
    assert pair.group.resolve("m", None) is model
    assert second.scheduler.batches == {}


async def test_it_is_ready_when_all_have_been_or_have_died(pair: Pair) -> None:
    pair.start(0, pair.model())
    await until(lambda: pair.group.engines[0].catalogue.reason is None)
    assert pair.group.not_ready_reason() == "engine process 1: the engine process is starting"
    pair.start(1)
    await pair.kill(1)
    assert pair.group.not_ready_reason() is None
    await pair.kill(0)
    assert pair.group.not_ready_reason() == "engine process 0: the engine process is being restarted"


async def test_administrative_calls_go_to_all(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.both()
    assert (await pair.group.load("m", 1)).version == "1"
    for side in pair.engines:
        assert side is not None
        assert [call["type"] for call in side.calls] == ["load"]

    async def unknown(message: dict[str, Any]) -> dict[str, Any]:
        raise UnknownModel("there is none") if message["type"] == "unload" else LoadRefused("broken")

    assert pair.engines[0] is not None
    pair.engines[0].fronts.call = unknown
    await pair.group.unload("m")  # it was served by the other
    with pytest.raises(LoadRefused, match="broken"):
        await pair.group.load("m", 1)
    await pair.kill(1)
    with pytest.raises(EngineRestarting):
        await pair.group.unload("m")
