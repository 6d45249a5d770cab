"""A worker runs its jobs in order on one thread, and its death is told once."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import pytest

from tests.support.engines import ArithmeticExecutor
from vernier.engine.pool import OpenSlots, Worker
from vernier.errors import EngineError


class Diary:
    """What a worker reports."""

    def __init__(self) -> None:
        self.events: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def opened(self, worker: Worker, slots: OpenSlots) -> None:
        self.events.put(("open", sorted(slots)))

    def exited(self, worker: Worker, error: BaseException | None) -> None:
        self.events.put(("exit", error))

    def next(self) -> tuple[str, Any]:
        return self.events.get(timeout=10)


@pytest.fixture
def diary() -> Diary:
    return Diary()


def test_every_variant_gets_a_slot_on_the_workers_own_thread(diary: Diary) -> None:
    executors = [ArithmeticExecutor("fp32"), ArithmeticExecutor("int8")]
    worker = Worker("w", executors, diary.opened, diary.exited)
    assert diary.next() == ("open", ["fp32", "int8"])
    threads: SimpleQueue[str] = SimpleQueue()
    worker.submit(lambda slots: threads.put(threading.current_thread().name))
    assert threads.get(timeout=10) == "w"
    worker.close()
    assert diary.next() == ("exit", None)
    assert worker.join(10)
    assert not worker.alive
    assert [executor.open_slots for executor in executors] == [0, 0]


def test_jobs_run_in_order_and_those_given_before_close_are_finished(diary: Diary) -> None:
    worker = Worker("w", [ArithmeticExecutor()], diary.opened, diary.exited)
    done: list[int] = []
    for i in range(100):
        worker.submit(lambda slots, i=i: done.append(i))
    worker.close()
    assert worker.join(10)
    assert done == list(range(100))


@pytest.mark.parametrize("error", [ValueError("oops"), SystemExit(3), MemoryError()])
def test_an_exception_that_leaves_a_job_is_the_workers_death_and_closes_its_slots(
    diary: Diary, error: BaseException
) -> None:
    executor = ArithmeticExecutor()

    def job(slots: OpenSlots) -> None:
        raise error

    worker = Worker("w", [executor], diary.opened, diary.exited)
    worker.submit(job)
    worker.submit(lambda slots: diary.events.put(("ran", None)))
    assert diary.next()[0] == "open"
    assert diary.next() == ("exit", error)
    assert worker.join(10)
    assert executor.open_slots == 0
    assert diary.events.empty()


def test_a_slot_that_cannot_be_opened_is_a_death_before_birth(diary: Diary) -> None:
    good = ArithmeticExecutor("fp32")
    worker = Worker("w", [good, ArithmeticExecutor("int8", fail_to_open=1)], diary.opened, diary.exited)
    kind, error = diary.next()
    assert kind == "exit"
    assert isinstance(error, EngineError)
    assert worker.join(10)
    assert good.open_slots == 0
