"""The memory of batches and answers on their way through a transport, and what waits on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from random import Random

import numpy as np
import pytest

from tests.support.border import Transport, stall, transported
from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import Sent, until, x, z_of
from tests.support.transported import Poisoned, ended
from vernier.border.batch import Answer
from vernier.border.memory.arena import MAX_BYTES
from vernier.serving.queueing.admission import Policy

Make = Callable[..., AbstractAsyncContextManager[Transport]]


@pytest.fixture(params=["process", "border"])
def make(request: pytest.FixtureRequest) -> Make:
    return partial(transported, request.param)


@pytest.fixture
def border() -> Make:
    return partial(transported, "border")


# --- memory -------------------------------------------------------------------------------------------
async def test_what_awaits_an_answer_can_read_it_for_as_long_as_it_likes(border: Make) -> None:
    """The memory of the engine process is far too small for all the answers, and is used again and again."""
    async with border(ArithmeticExecutor(), answer_chunks=2, largest=1024) as transport:
        kept: list[tuple[Sent, np.ndarray, memoryview]] = []
        for number in range(60):
            sent = Poisoned(500, 500, front=transport.front, start=7.0 * number)
            transport.scheduler.submit(sent.batch)
            await until(lambda sent=sent: sent.releases == 1)
            if number % 10 == 0:
                answer = sent.answer(1)
                kept.append((sent, answer.outputs["y"][3:7], memoryview(answer.outputs["z"])))
            else:
                sent.ends.clear()
        for _ in range(1200):  # more than twice the memory
            sent = Sent(1000)
            transport.scheduler.submit(sent.batch)
            await until(lambda sent=sent: sent.releases == 1)
            sent.answer()
        for sent, rows, view in kept:
            np.testing.assert_array_equal(rows, 2 * sent.inputs[1]["x"][3:7])
            np.testing.assert_array_equal(np.asarray(view), z_of(sent.inputs[1]))


async def test_answers_that_are_read_give_their_memory_back(border: Make) -> None:
    async with border(ArithmeticExecutor()) as transport:
        front = transport.front
        assert front is not None
        sent = [Sent(1, 1) for _ in range(100)]
        for one in sent:
            transport.scheduler.submit(one.batch)
        await ended(transport, *sent)
        assert front.session._unread
        for one in sent:
            one.ends.clear()
        await until(lambda: not front.session._unread)


async def test_an_arena_that_is_full_only_makes_it_slower(border: Make) -> None:
    async with border(ArithmeticExecutor(), chunks=1, answer_chunks=1, slots=2) as transport:
        front = transport.front
        assert front is not None
        hoard = front.arena.take(MAX_BYTES)
        answers = front.session._arena.take(MAX_BYTES)
        sent = [Sent(1, 3, start=10.0 * n) for n in range(50)]
        for one in sent:
            transport.scheduler.submit(one.batch)
        await ended(transport, *sent)
        for one in sent:
            one.answer(0)
            one.answer(1)
        del hoard, answers
        assert front.free_chunks == 1


async def test_a_side_that_does_not_read_holds_up_nobody_else(border: Make) -> None:
    """Thousands of batches with cancels between them wait in the other's socket, and then here."""
    random = Random(5)
    async with border(ArithmeticExecutor(), slots=2, policy=Policy(queue_limit=10**6)) as transport:
        front = transport.front
        assert front is not None
        for side in (front.session._channel, front.engine._channel):
            for end in (front.session._channel, front.engine._channel):
                end._socket.setsockopt(1, 7, 60_000)  # SO_SNDBUF
            go_on = stall(side)
            sent = [Sent(*[1] * random.randint(1, 20), start=3.0 * n) for n in range(800)]
            cancelled = []
            for one in sent:
                transport.scheduler.submit(one.batch)
                await asyncio.sleep(0)
                if random.random() < 0.2:
                    cancelled.append((one, random.randrange(len(one.ends))))
                    transport.scheduler.cancel(*(cancelled[-1][0].batch, cancelled[-1][1]))
            await asyncio.sleep(0.05)
            backlogs = front.session._channel._backlog, front.engine._channel._backlog
            assert any(backlogs), "nothing had to wait"
            go_on()
            await ended(transport, *sent)
            assert not any(backlogs)
            for one in sent:
                for at in range(len(one.ends)):
                    if (one, at) not in cancelled:
                        one.answer(at)
                    else:
                        assert one.kinds[at] in (None,)
        transport.check_books()


async def test_a_turn_of_more_requests_than_a_record_holds(make: Make) -> None:
    async with make(ArithmeticExecutor(), largest=1024, policy=Policy(queue_limit=10**6)) as transport:
        sent = Sent(*[1] * 10_000)
        transport.scheduler.submit(sent.batch)
        await ended(transport, sent)
        assert set(sent.kinds) == {Answer}
        for at in (0, 4095, 4096, 9_999):
            sent.answer(at)
        assert transport.check_books()["answered"] == 10_000


async def test_large_arrays_travel_in_memory_of_their_own(make: Make) -> None:
    rows = MAX_BYTES // 8 + 5
    async with make(ArithmeticExecutor(), largest=1024, policy=Policy(queue_limit=10**7)) as transport:
        sent = Sent(rows, 3)
        transport.scheduler.submit(sent.batch)
        await ended(transport, sent)
        for at in range(2):
            sent.answer(at)
        assert x(rows)["x"].nbytes > MAX_BYTES
