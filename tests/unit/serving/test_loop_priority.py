"""How the loop's thread is scheduled while requests are refused, as the kernel tells."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import Sent, busy, serving, until
from vernier.errors import QueueFull
from vernier.serving.loop_priority import LoopPriority
from vernier.serving.queueing.admission import Policy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has batch threads")


@pytest.fixture(autouse=True)
def _ordinary_again() -> Iterator[None]:
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture
def idler() -> Iterator[threading.Event]:
    """Ends the threads of a test."""
    event = threading.Event()
    yield event
    event.set()


def start(event: threading.Event) -> int:
    """A thread that waits for the event; its number."""
    thread = threading.Thread(target=event.wait, args=(60,), daemon=True)
    thread.start()
    assert thread.native_id is not None
    return thread.native_id


async def test_the_loops_thread_is_a_batch_thread_until_nothing_was_refused_for_a_while() -> None:
    priority = LoopPriority()
    for _ in range(2):
        priority.refused()
        priority.refused()
        assert priority.lowered
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        await until(lambda: not priority.lowered)
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


async def test_threads_that_were_started_meanwhile_are_ordinary_afterwards(idler: threading.Event) -> None:
    priority = LoopPriority()
    before = start(idler)
    priority.refused()
    meanwhile = start(idler)
    assert os.sched_getscheduler(before) == os.SCHED_OTHER
    assert os.sched_getscheduler(meanwhile) == os.SCHED_BATCH, "it is inherited, or this test shows nothing"
    priority.restore()
    assert [os.sched_getscheduler(thread) for thread in (0, before, meanwhile)] == [os.SCHED_OTHER] * 3
    priority.restore()


async def test_what_the_operator_chose_is_left_alone() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    priority = LoopPriority()
    priority.refused()
    assert not priority.lowered
    priority.restore()
    assert os.sched_getscheduler(0) == os.SCHED_BATCH


async def test_a_system_that_forbids_the_change_or_has_no_such_call_serves_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*arguments: object) -> None:
        raise PermissionError("forbidden")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    priority = LoopPriority()
    priority.refused()
    monkeypatch.undo()
    monkeypatch.delattr(os, "sched_getscheduler")
    priority.refused()
    monkeypatch.undo()
    assert not priority.lowered
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


async def test_a_scheduler_that_refuses_while_it_computes_lowers_it_and_a_drained_one_does_not() -> None:
    executor, policy, refused = ArithmeticExecutor(), Policy(queue_limit=1), Sent()
    async with serving(executor, policy=policy, largest=1) as scheduler:
        await busy(scheduler, executor)
        scheduler.submit(Sent().batch)
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        scheduler.submit(refused.batch)
        assert refused.kinds == [QueueFull]
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
