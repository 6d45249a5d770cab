"""What the supervisor does when processes cannot be started, die, or lose each other."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.scheduling import until
from vernier.border.records.channel import socket_pair
from vernier.processes import places
from vernier.processes.control import Child, Control
from vernier.processes.supervisor import Supervisor
from vernier.settings import Settings


class FakeProcess:
    """A child that does nothing until it is killed; the test has its end of the control socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.returncode: int | None = None
        self.messages: list[tuple[str, int]] = []
        self._end = asyncio.Event()
        self.control = Control(sock, self._take, lambda: None)

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        self.messages.append((message["type"], len(fds)))
        for fd in fds:
            os.close(fd)

    async def wait(self) -> int:
        await self._end.wait()
        self.control.close()
        self.returncode = -9
        return -9

    def kill(self) -> None:
        self._end.set()


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Children, by order of their start; an OSError in the list is raised instead of the next start."""
    made: list[Any] = []

    async def spawn(*command: str, pass_fds: tuple[int, ...], **_: Any) -> FakeProcess:
        if made and isinstance(made[-1], OSError):
            raise made.pop()
        process = FakeProcess(socket.socket(fileno=os.dup(pass_fds[0])))
        made.append(process)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn)
    monkeypatch.setattr(places, "FIRST_PAUSE_S", 0.01)
    return made


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


async def end(supervisor: Supervisor) -> None:
    supervisor._stopping = True
    for process in supervisor._running:
        process.process.kill()
    await until(lambda: not supervisor._running)
    await asyncio.sleep(0.02)
    for fd in (
        supervisor._counts,
        supervisor._limits,
        *[p.memory for p in supervisor._places],
    ):
        os.close(fd)


def make(fronts: int = 2, engines: int = 1) -> Supervisor:
    return Supervisor(Settings(), fronts, engines, [], [], ["a"])


async def test_the_engine_process_and_each_front_are_introduced_to_each_other(spawned: list[Any]) -> None:
    supervisor = make()
    for place in supervisor._places:
        await supervisor._start(place)
    engine, *fronts = spawned
    await until(lambda: len(engine.messages) == 3)
    assert engine.messages == [("hello", 1), ("front", 4), ("front", 4)]
    for front in fronts:
        await until(lambda front=front: len(front.messages) == 2)
        assert front.messages == [("hello", 3), ("engine", 4)]
    engine.kill()
    await until(lambda: len(spawned) == 4)
    await until(lambda: len(spawned[3].messages) == 3)
    await until(lambda: all(front.messages[2:] == [("engine", 4)] for front in fronts))
    fronts[0].kill()
    await until(lambda: len(spawned) == 5)
    await until(lambda: len(spawned[3].messages) == 4)
    await end(supervisor)


async def test_a_front_that_has_lost_a_living_engine_process_gets_it_again(spawned: list[Any]) -> None:
    supervisor = make()
    for place in supervisor._places:
        await supervisor._start(place)
    engine, first, second = spawned
    first.control.send({"type": "unconnected", "engine": 0})
    await until(lambda: first.messages[-2:] == [("engine", 4)] * 2)
    await until(lambda: engine.messages.count(("front", 4)) == 3)
    assert second.messages.count(("engine", 4)) == 1
    await end(supervisor)


async def test_fronts_accept_together_when_all_are_ready(spawned: list[Any]) -> None:
    """The first would else take every connection that waits, and keep it."""
    supervisor = make()
    for place in supervisor._places:
        await supervisor._start(place)
    _, first, second = spawned
    first.control.send({"type": "ready"})
    await until(lambda: supervisor._fronts[0].running.ready)  # type: ignore[union-attr]
    await asyncio.sleep(0.02)
    assert ("accept", 0) not in first.messages
    second.control.send({"type": "ready"})
    await until(lambda: ("accept", 0) in first.messages and ("accept", 0) in second.messages)
    second.kill()
    await until(lambda: len(spawned) == 4)
    await until(lambda: ("accept", 0) in spawned[3].messages)
    await end(supervisor)


async def test_a_front_that_dies_while_it_starts_keeps_the_others_from_nothing(spawned: list[Any]) -> None:
    supervisor = make()
    for place in supervisor._places:
        await supervisor._start(place)
    _, first, second = spawned
    first.control.send({"type": "ready"})
    second.kill()
    await until(lambda: ("accept", 0) in first.messages)
    await end(supervisor)


async def test_a_process_that_cannot_be_started_is_tried_again(spawned: list[Any]) -> None:
    supervisor = make(1)
    for place in supervisor._places:
        await supervisor._start(place)
    engine, front = spawned
    spawned.append(OSError(11, "no process left"))
    engine.kill()
    await until(lambda: supervisor._engines[0].running is None)
    await until(lambda: supervisor._engines[0].running is not None)
    spawned.append(OSError(11, "no process left"))
    front.kill()
    await until(lambda: isinstance(spawned[-1], FakeProcess) and ("engine", 4) in spawned[-1].messages)
    await end(supervisor)


async def test_a_start_without_descriptors_leaves_none_open(
    spawned: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = make(1)
    for place in supervisor._places:
        await supervisor._start(place)
    await asyncio.sleep(0.01)
    before = len(os.listdir("/proc/self/fd"))
    dup, left = os.dup, [3]

    def exhausted(fd: int) -> int:
        if not left[0]:
            raise OSError(24, "too many open files")
        left[0] -= 1
        return dup(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", exhausted)
        supervisor._introduce(supervisor._fronts[0], supervisor._engines[0])
    assert len(os.listdir("/proc/self/fd")) == before
    await end(supervisor)


async def test_a_child_whose_supervisor_goes_before_its_first_message_ends() -> None:
    ours, theirs = socket_pair()
    child = Child(theirs, lambda message, fds: None)
    ours.close()
    with pytest.raises(asyncio.CancelledError):
        await child.hello
    assert child.ended.is_set()
    child.close()
