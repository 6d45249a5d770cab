"""Executors that span several devices: who runs where, and what is left when one device is lost."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import serving, until, x, z_of
from vernier.engine.plans.multi_device import MultiDeviceExecutor
from vernier.errors import DeviceFailed, EngineError, NotReady


def fail(rows: np.ndarray) -> None:
    raise DeviceFailed("GPU 1 failed while running; nothing can run on it until this process restarts")


async def test_every_device_has_its_workers_and_gets_its_share() -> None:
    parts = [ArithmeticExecutor(), ArithmeticExecutor(), ArithmeticExecutor()]
    async with serving(MultiDeviceExecutor(parts), slots=6, largest=1) as scheduler:
        assert [part.open_slots for part in parts] == [2, 2, 2]
        for part in parts:
            part.gate.clear()
        answers = [asyncio.ensure_future(scheduler.predict(x(1, i), rows=1)) for i in range(6)]
        await until(lambda: sum(len(part.ran) for part in parts) == 6)
        assert [len(part.ran) for part in parts] == [2, 2, 2]
        for part in parts:
            part.gate.set()
        for i, answer in enumerate(await asyncio.gather(*answers)):
            np.testing.assert_array_equal(answer.outputs["z"], z_of(x(1, i)))


async def test_the_device_with_the_fewest_busy_workers_is_next() -> None:
    parts = [ArithmeticExecutor(), ArithmeticExecutor()]
    async with serving(MultiDeviceExecutor(parts), slots=4, largest=1) as scheduler:
        for step in range(8):  # whatever order the workers rest in
            for part in parts:
                part.begin()
                part.gate.clear()
            pair = [asyncio.ensure_future(scheduler.predict(x(1, step + i), rows=1)) for i in range(2)]
            await until(lambda: sum(len(part.ran) for part in parts) == 2)
            assert [len(part.ran) for part in parts] == [1, 1]
            for part in parts:
                part.gate.set()
            await asyncio.gather(*pair)


@pytest.mark.parametrize("inline", [True, False])
async def test_a_lost_device_turns_readiness_red_and_the_other_goes_on_answering(inline: bool) -> None:
    parts = [ArithmeticExecutor(), ArithmeticExecutor()]
    async with serving(MultiDeviceExecutor(parts), slots=4, largest=1, inline=inline) as scheduler:
        parts[0].fault = fail
        outcomes = await asyncio.gather(
            *(scheduler.predict(x(1, i), rows=1) for i in range(20)), return_exceptions=True
        )
        failed = [outcome for outcome in outcomes if isinstance(outcome, EngineError)]
        assert 1 <= len(failed) <= 3  # what ran there, and no more
        assert all("until this process restarts" in error.message for error in failed)
        assert scheduler.fault is not None
        assert "GPU 1 failed" in scheduler.fault
        seen = len(parts[1].ran)
        for i in range(10):
            answer = await scheduler.predict(x(1, i), rows=1)
            np.testing.assert_array_equal(answer.outputs["z"], z_of(x(1, i)))
        assert len(parts[1].ran) == seen + 10
        await until(lambda: parts[0].open_slots == 0)


async def test_when_every_device_is_lost_nothing_is_taken_any_more() -> None:
    parts = [ArithmeticExecutor(fault=fail), ArithmeticExecutor(fault=fail)]
    async with serving(MultiDeviceExecutor(parts), slots=2, largest=1) as scheduler:
        outcomes = await asyncio.gather(
            *(scheduler.predict(x(1, i), rows=1) for i in range(8)), return_exceptions=True
        )
        assert all(isinstance(outcome, EngineError) for outcome in outcomes)
        with pytest.raises(NotReady):
            await scheduler.predict(x(), rows=1)


async def test_a_dead_worker_is_replaced_on_its_own_device() -> None:
    parts = [ArithmeticExecutor(), ArithmeticExecutor()]

    def die(rows: np.ndarray) -> None:
        parts[1].fault = None
        raise SystemExit("a worker ends")

    async with serving(MultiDeviceExecutor(parts), slots=4, largest=1) as scheduler:
        parts[1].fault = die
        outcomes = await asyncio.gather(
            *(scheduler.predict(x(1, i), rows=1) for i in range(4)), return_exceptions=True
        )
        assert sum(isinstance(outcome, EngineError) for outcome in outcomes) == 1
        await until(lambda: scheduler.fault is None)
        assert [part.open_slots for part in parts] == [2, 2]


async def test_a_variant_is_installed_on_every_device() -> None:
    parts = [ArithmeticExecutor(), ArithmeticExecutor()]
    late = [ArithmeticExecutor("int8"), ArithmeticExecutor("int8")]
    async with serving(MultiDeviceExecutor(parts), slots=4, largest=1) as scheduler:
        await scheduler.install(MultiDeviceExecutor(late))
        assert [part.open_slots for part in late] == [2, 2]
        scheduler.set_precision("int8")
        answers = await asyncio.gather(*(scheduler.predict(x(1, i), rows=1) for i in range(8)))
        assert {answer.precision for answer in answers} == {"int8"}


def test_a_multi_device_executor_speaks_for_all_its_parts() -> None:
    parts = [ArithmeticExecutor(), ArithmeticExecutor()]
    joined = MultiDeviceExecutor(parts)
    assert joined.engine_bytes == 2
    assert joined.device == "cpu,cpu"
    slot = joined.open_slot()
    assert [part.open_slots for part in parts] == [1, 0]
    slot.close()
    joined.close()
