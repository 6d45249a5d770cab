"""How the loop's thread is scheduled while requests are refused: by the real system calls."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import Sent, serving, until
from tests.support.threads import NO_SLICES, Idler
from vernier.errors import QueueFull
from vernier.serving.admission import Policy
from vernier.serving.deference import Deference
from vernier.serving.scheduler import Scheduler
from vernier.serving.timeslice import set_time_slice

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="batch threads are Linux's")


@pytest.fixture(autouse=True)
def ordinary() -> Iterator[None]:
    """Every test begins and ends with a thread that preempts when it is woken."""
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


async def test_it_defers_from_the_first_refusal_until_there_was_none_for_a_while() -> None:
    deference = Deference()
    deference.refused(1.0)
    assert deference.active
    assert os.sched_getscheduler(0) == os.SCHED_BATCH
    deference.refused(1.01)
    await until(lambda: not deference.active)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    deference.refused(2.0)
    assert os.sched_getscheduler(0) == os.SCHED_BATCH
    await until(lambda: not deference.active)


async def test_a_thread_that_somebody_scheduled_on_purpose_is_left_alone() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    deference = Deference()
    deference.refused(1.0)
    assert not deference.active
    assert deference.earliest(2.0) == 2.0


async def test_while_it_defers_requests_may_have_come_since_the_last_turn_began() -> None:
    deference = Deference()
    assert deference.earliest(1.0) == 1.0
    deference.refused(1.0)
    assert deference.earliest(1.002) == 1.0
    assert deference.earliest(1.0025) == 1.0, "the same turn"
    turns = 0

    def turn() -> bool:
        nonlocal turns
        turns += 1
        return turns > 1

    await until(turn)
    assert deference.earliest(1.003) == 1.002
    await until(lambda: not deference.active)
    assert deference.earliest(9.0) == 9.0


async def test_a_wait_is_never_longer_than_a_slice() -> None:
    deference = Deference()
    deference.refused(1.0)
    assert 2.0 - 0.015 < deference.earliest(2.0) < 2.0
    await until(lambda: not deference.active)


@pytest.fixture
def idlers() -> Iterator[list[Idler]]:
    made: list[Idler] = []
    yield made
    for thread in made:
        thread.end()


async def test_threads_that_begin_while_it_defers_become_ordinary(idlers: list[Idler]) -> None:
    deference = Deference()
    deference.refused(1.0)
    idlers.append(Idler())
    assert idlers[0].policy == os.SCHED_BATCH, "they inherit it, or there would be nothing to do"

    def refused_ever_more() -> bool:
        deference.refused(1.0)
        return idlers[0].policy == os.SCHED_OTHER

    await until(refused_ever_more)
    assert deference.active
    assert os.sched_getscheduler(0) == os.SCHED_BATCH, "the loop's thread still defers"
    idlers.append(Idler())
    await until(lambda: not deference.active)
    assert [thread.policy for thread in idlers] == [os.SCHED_OTHER] * 2


async def test_threads_that_were_batch_threads_before_stay_so(idlers: list[Idler]) -> None:
    idlers.append(Idler())
    os.sched_setscheduler(idlers[0].id, os.SCHED_BATCH, os.sched_param(0))
    deference = Deference()
    deference.refused(1.0)
    await until(lambda: not deference.active)
    assert idlers[0].policy == os.SCHED_BATCH


needs_slices = pytest.mark.skipif(NO_SLICES, reason="slices of one's own came with Linux 6.12")


@needs_slices
async def test_all_threads_have_longer_slices_while_it_defers(idlers: list[Idler]) -> None:
    idlers += [Idler(), Idler()]
    usual = idlers[0].slice_s
    set_time_slice(idlers[1].id, 0.003)
    deference = Deference()
    deference.refused(1.0)
    idlers.append(Idler())
    assert [thread.slice_s for thread in idlers] == pytest.approx([0.01] * 3)
    await until(lambda: not deference.active)
    assert [thread.slice_s for thread in idlers] == pytest.approx([usual, 0.003, usual])


@needs_slices
async def test_slices_take_a_fifth_of_the_shortest_objective_at_most(idlers: list[Idler]) -> None:
    idlers.append(Idler())
    deference = Deference()
    deference.join("patient", None)
    deference.join("slow", 1.0)
    deference.join("quick", 0.03)
    deference.refused(1.0)
    assert idlers[0].slice_s == pytest.approx(0.006)
    assert deference.earliest(2.0) == pytest.approx(2.0 - 0.01), "a slice and a tick of the kernel's clock"
    await until(lambda: not deference.active)
    deference.leave("quick")
    deference.refused(3.0)
    assert idlers[0].slice_s == pytest.approx(0.01)
    await until(lambda: not deference.active)


@needs_slices
async def test_objectives_that_can_bear_no_longer_slices_get_none(idlers: list[Idler]) -> None:
    idlers.append(Idler())
    usual = idlers[0].slice_s
    deference = Deference()
    deference.join("quick", 0.01)
    deference.refused(1.0)
    assert deference.active
    assert idlers[0].slice_s == usual
    await until(lambda: not deference.active)


@needs_slices
async def test_a_scheduler_brings_its_objective_and_takes_it_along(idlers: list[Idler]) -> None:
    idlers.append(Idler())
    deference = Deference()
    async with serving(ArithmeticExecutor(), policy=Policy(objective_s=0.04), deference=deference):
        deference.refused(1.0)
        assert idlers[0].slice_s == pytest.approx(0.008)
        await until(lambda: not deference.active)
    deference.refused(2.0)
    assert idlers[0].slice_s == pytest.approx(0.01)
    await until(lambda: not deference.active)


async def test_a_scheduler_defers_when_it_refuses_while_a_worker_computes() -> None:
    executor, deference = ArithmeticExecutor(), Deference()
    policy = Policy(queue_limit=1)
    async with serving(executor, policy=policy, largest=1, deference=deference) as scheduler:
        executor.gate.clear()
        scheduler.submit(Sent().batch)
        await until(lambda: scheduler.queued == 0)
        scheduler.submit(Sent().batch)
        assert not deference.active
        refused(scheduler)
        assert deference.active
        executor.gate.set()
    await until(lambda: not deference.active)


def news_of(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when another thread has told the loop something."""
    told, tell = threading.Event(), loop.call_soon_threadsafe

    def telling(*call: Any) -> asyncio.Handle:
        handle = tell(*call)
        told.set()
        return handle

    monkeypatch.setattr(loop, "call_soon_threadsafe", telling)
    return told


def stand_still(event: threading.Event) -> None:
    """The loop does nothing until then."""
    assert event.wait(30)


def refused(scheduler: Scheduler) -> None:
    sent = Sent()
    scheduler.submit(sent.batch)
    assert sent.kinds == [QueueFull]


@pytest.mark.parametrize("defers", [True, False])
async def test_while_it_defers_a_batch_waits_for_what_the_loop_is_about_to_read(
    defers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker becomes idle while one request waits in the queue and another at the socket."""
    executor, deference = ArithmeticExecutor(), Deference()
    policy = Policy(max_queue_delay_s=0.0)
    async with serving(executor, policy=policy, largest=4, deference=deference) as scheduler:
        executor.gate.clear()
        first, queued, unread = [Sent() for _ in range(3)]
        scheduler.submit(first.batch)
        await until(lambda: scheduler.queued == 0)
        scheduler.submit(queued.batch)
        if defers:
            deference.refused(1.0)
        loop = asyncio.get_running_loop()
        finished = news_of(loop, monkeypatch)
        executor.gate.set()
        stand_still(finished)
        loop.call_soon(scheduler.submit, unread.batch)
        await until(lambda: bool(first.releases and queued.releases and unread.releases))
        assert [len(batch) for batch in executor.ran] == ([1, 2] if defers else [1, 1, 1])
    await until(lambda: not deference.active)


async def test_while_it_defers_a_full_batch_waits_for_nothing() -> None:
    executor, deference = ArithmeticExecutor(), Deference()
    async with serving(executor, largest=2, deference=deference) as scheduler:
        executor.gate.clear()
        first, *queued = [Sent() for _ in range(4)]
        scheduler.submit(first.batch)
        await until(lambda: scheduler.queued == 0)
        for request in queued:
            scheduler.submit(request.batch)
        deference.refused(1.0)
        executor.gate.set()
        await until(lambda: all(request.releases for request in (first, *queued)))
        assert [len(batch) for batch in executor.ran] == [1, 2, 1]
    await until(lambda: not deference.active)
