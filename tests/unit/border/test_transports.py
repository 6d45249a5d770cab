"""One contract for both ways of a batch to the scheduler: a call, and the border between processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.support.border import FrontSide, Transport, stall, transported
from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import Sent, until, x, z_of
from vernier.border.arena import MAX_BYTES
from vernier.border.batch import Answer, RequestBatch
from vernier.errors import DeadlineExceeded, Draining, EngineError, QueueFull, UnsupportedPrecision
from vernier.serving.admission import Policy

Make = Callable[..., AbstractAsyncContextManager[Transport]]


@pytest.fixture(params=["process", "border"])
def make(request: pytest.FixtureRequest) -> Make:
    return partial(transported, request.param)


@pytest.fixture
def border() -> Make:
    return partial(transported, "border")


class Poisoned(Sent):
    """A batch whose memory is written over as soon as it is released."""

    def __init__(self, *each: int, front: FrontSide | None = None, **fields: Any) -> None:
        super().__init__(*each, **fields)
        inputs = self.batch.inputs["x"]
        if front is not None:  # where a front's bodies lie
            memory = front.arena.take(inputs.nbytes).view(np.float32).reshape(inputs.shape)
            memory[...] = inputs
            self.batch.inputs["x"] = memory

    def released(self, batch: RequestBatch) -> None:
        super().released(batch)
        batch.inputs["x"][...] = np.nan


async def ended(transport: Transport, *sent: Sent) -> None:
    await transport.settle()
    await until(lambda: all(one.releases for one in sent))
    assert [one.releases for one in sent] == [1] * len(sent)


async def busy(transport: Transport, executor: ArithmeticExecutor) -> Sent:
    """Keeps the only worker until the executor's gate is set."""
    executor.gate.clear()
    running = Sent()
    transport.scheduler.submit(running.batch)
    await until(lambda: len(executor.ran) == 1)
    return running


# --- answers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "each",
    [(1,), (1,) * 64, (3, 1, 8, 2, 7, 1), (20,), (2, 100, 3), (8, 8), (5,) * 9],
    ids=lambda each: f"{len(each)}x{max(each)}",
)
@pytest.mark.parametrize("fresh", [True, False])
async def test_every_request_gets_its_rows_and_the_batch_is_released_once(
    make: Make, each: tuple[int, ...], fresh: bool
) -> None:
    async with make(ArithmeticExecutor(fresh=fresh), slots=2) as transport:
        sent = [Poisoned(*each, front=transport.front, start=1e5 * n) for n in range(3)]
        for one in sent:
            transport.scheduler.submit(one.batch)
        await ended(transport, *sent)
        for one in sent:
            assert one.kinds == [Answer] * len(each)
            for at, inputs in enumerate(one.inputs):
                answer = one.answer(at)
                assert list(answer.outputs) == ["y", "z"]
                np.testing.assert_array_equal(answer.outputs["z"], z_of(inputs))
                assert answer.precision == "fp32"
                assert 1 <= answer.batch_size <= 8
                assert answer.queue_s >= 0
        assert transport.check_books()["answered"] == 3 * len(each)


async def test_requests_of_a_batch_end_in_their_order(make: Make) -> None:
    class Ordered(Sent):
        def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
            super().answered(batch, requests, answer)
            order.extend(requests)

    order: list[int] = []
    async with make(ArithmeticExecutor()) as transport:
        sent = Ordered(*[1] * 40)
        transport.scheduler.submit(sent.batch)
        await ended(transport, sent)
        assert order == list(range(40))


@pytest.mark.parametrize("outputs", [("z",), ("y",), ("z", "y"), ("y", "z")])
async def test_the_wanted_outputs_come_in_the_wanted_order(make: Make, outputs: tuple[str, ...]) -> None:
    async with make(ArithmeticExecutor()) as transport:
        sent = Sent(1, 2, outputs=outputs)
        transport.scheduler.submit(sent.batch)
        await ended(transport, sent)
        answer = sent.answer(1)
        assert tuple(answer.outputs) == outputs
        if "z" in outputs:
            np.testing.assert_array_equal(answer.outputs["z"], z_of(sent.inputs[1]))


async def test_a_variant_can_be_demanded_and_one_that_is_not_loaded_is_refused(make: Make) -> None:
    executors = ArithmeticExecutor("fp32"), ArithmeticExecutor("fp16")
    async with make(*executors, precision="fp16") as transport:
        sent = [Sent(precision=precision) for precision in (None, "fp32", "fp16", "int8")]
        for one in sent:
            transport.scheduler.submit(one.batch)
        await ended(transport, *sent)
        assert [one.answer().precision for one in sent[:3]] == ["fp16", "fp32", "fp16"]
        assert sent[3].kinds == [UnsupportedPrecision]
        assert transport.check_books()["admitted"] == 3


async def test_a_variant_that_joins_under_traffic_is_known_by_its_name_before_the_catalogue_tells(
    border: Make,
) -> None:
    """A rebuilt engine of a variant that the front has not heard of answers at once."""
    async with border(
        ArithmeticExecutor("fp32"), ArithmeticExecutor("int8"), declared=("fp32",), precision="int8"
    ) as transport:
        assert transport.scheduler.precisions == ("fp32",)
        sent = Sent()
        transport.scheduler.submit(sent.batch)
        await ended(transport, sent)
        assert sent.answer().precision == "int8"


async def test_an_output_that_is_not_finite_is_computed_anew_at_fp32(make: Make) -> None:
    def spoil(rows: np.ndarray) -> np.ndarray:
        return rows[:, 0] == 100.0

    executors = ArithmeticExecutor("fp32"), ArithmeticExecutor("int8", spoil=spoil)
    async with make(*executors, precision="int8") as transport:
        sent = Poisoned(1, 1, 1, front=transport.front)
        transport.scheduler.submit(sent.batch)
        await ended(transport, sent)
        assert [sent.answer(at).precision for at in range(3)] == ["int8", "fp32", "int8"]
        assert not np.isnan(np.concatenate(executors[0].ran)).any()


async def test_a_failure_ends_the_request_that_caused_it(make: Make) -> None:
    def fault(rows: np.ndarray) -> None:
        if (rows == 200.0).any():
            raise EngineError("these rows cannot be computed")

    async with make(ArithmeticExecutor(fault=fault)) as transport:
        sent = Poisoned(1, 1, 1, 1, front=transport.front)
        transport.scheduler.submit(sent.batch)
        await ended(transport, sent)
        assert sent.kinds == [Answer, Answer, EngineError, Answer]
        assert sent.error(2).message == "these rows cannot be computed"
        totals = transport.check_books()
        assert (totals["answered"], totals["failed"]) == (3, 1)


async def test_a_target_that_faults_costs_the_others_nothing(make: Make) -> None:
    class Broken(Sent):
        def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
            super().answered(batch, requests, answer)
            raise ZeroDivisionError

    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with make(ArithmeticExecutor()) as transport:
        sent = [Sent(1, 1), Broken(1, 1), Sent(1)]
        for one in sent:
            transport.scheduler.submit(one.batch)
        await ended(transport, *sent)
        for one in sent:
            assert set(one.kinds) == {Answer}
        transport.check_books()
    assert {type(context["exception"]) for context in reported} == {ZeroDivisionError}


# --- deadlines, cancels, refusals ---------------------------------------------------------------------
async def test_deadlines_that_have_passed_are_told_and_the_others_are_answered(make: Make) -> None:
    async with make(ArithmeticExecutor()) as transport:
        now = time.monotonic()
        sent = Poisoned(1, 2, 1, front=transport.front, deadlines=[now - 1, now + 30, now])
        transport.scheduler.submit(sent.batch)
        await ended(transport, sent)
        assert sent.kinds == [DeadlineExceeded, Answer, DeadlineExceeded]
        totals = transport.check_books()
        assert (totals["admitted"], totals["answered"]) == (1, 1)


async def test_a_deadline_that_comes_while_the_request_waits_or_runs(make: Make) -> None:
    executor = ArithmeticExecutor()
    async with make(executor) as transport:
        executor.gate.clear()
        now = time.monotonic()
        running = Poisoned(front=transport.front, deadlines=[now + 0.2])
        transport.scheduler.submit(running.batch)
        await until(lambda: len(executor.ran) == 1)
        waiting = Poisoned(1, 1, front=transport.front, deadlines=[now + 0.2, now + 30])
        transport.scheduler.submit(waiting.batch)
        await until(lambda: running.kinds == [DeadlineExceeded])
        await until(lambda: waiting.kinds == [DeadlineExceeded, None])
        assert running.releases == 0, "its memory is read still"
        executor.gate.set()
        await ended(transport, running, waiting)
        assert waiting.kinds == [DeadlineExceeded, Answer]
        assert not np.isnan(np.concatenate(executor.ran)).any()
        assert transport.check_books()["expired"] == 2


async def test_cancelling_what_waits_runs_or_has_ended(make: Make) -> None:
    executor = ArithmeticExecutor()
    async with make(executor, largest=4) as transport:
        executor.gate.clear()
        running, waiting = Poisoned(2, 2, front=transport.front), Poisoned(1, 1, 1, front=transport.front)
        transport.scheduler.submit(running.batch)
        await until(lambda: len(executor.ran) == 1)
        transport.scheduler.submit(waiting.batch)
        transport.scheduler.cancel(running.batch, 0)
        for _ in range(2):
            transport.scheduler.cancel(waiting.batch, 1)
        executor.gate.set()
        await ended(transport, running, waiting)
        assert running.kinds == [None, Answer]
        assert waiting.kinds == [Answer, None, Answer]
        for at in range(2):
            transport.scheduler.cancel(running.batch, at)
        totals = transport.check_books()
        assert (totals["cancelled"], totals["answered"]) == (2, 3)


async def test_a_batch_all_of_which_is_cancelled_is_released_when_nothing_reads_it(make: Make) -> None:
    executor = ArithmeticExecutor()
    async with make(executor) as transport:
        executor.gate.clear()
        sent = Poisoned(1, 1, front=transport.front)
        transport.scheduler.submit(sent.batch)
        await until(lambda: len(executor.ran) == 1)
        for at in range(2):
            transport.scheduler.cancel(sent.batch, at)
        await asyncio.sleep(0.02)
        assert sent.releases == 0
        executor.gate.set()
        await ended(transport, sent)
        assert sent.kinds == [None, None]


async def test_a_cancelled_request_is_told_nothing_though_its_answer_is_on_the_way(border: Make) -> None:
    async with border(ArithmeticExecutor()) as transport:
        front = transport.front
        assert front is not None
        sent = Sent(1, 2, 3, 1)
        go_on = stall(front.engine._channel)
        transport.scheduler.submit(sent.batch)
        await until(
            lambda: not front.session._batches and transport.behind._metrics.totals()["answered"] == 4
        )
        for at in (1, 3):
            transport.scheduler.cancel(sent.batch, at)
        go_on()
        await ended(transport, sent)
        assert sent.kinds == [Answer, None, Answer, None]
        for at in (0, 2):
            sent.answer(at)
        totals = transport.check_books()
        assert (totals["answered"], totals["cancelled"]) == (2, 2)


async def test_what_may_not_wait_is_refused(make: Make) -> None:
    executor = ArithmeticExecutor()
    async with make(executor, policy=Policy(queue_limit=6), largest=1) as transport:
        running = await busy(transport, executor)
        waiting, refused = Sent(3, 3, 2), Sent(1)
        transport.scheduler.submit(waiting.batch)
        transport.scheduler.submit(refused.batch)
        await until(lambda: refused.kinds == [QueueFull] and refused.releases == 1)
        error = refused.error()
        assert isinstance(error, QueueFull)
        assert error.retry_after_s > 0
        assert error.reason == "queue_full"
        assert waiting.kinds == [None, None, QueueFull]
        assert transport.scheduler.refusal() is not None
        executor.gate.set()
        await ended(transport, running, waiting)
        assert transport.scheduler.refusal() is None
        assert transport.check_books()["admitted"] == 3


async def test_nothing_is_admitted_while_the_model_leaves(make: Make) -> None:
    executor = ArithmeticExecutor()
    async with make(executor) as transport:
        running = await busy(transport, executor)
        leaving = asyncio.create_task(transport.behind.drain(10))
        await asyncio.sleep(0)
        late = Sent(1, 1)
        transport.scheduler.submit(late.batch)
        await until(lambda: late.kinds == [Draining, Draining])
        executor.gate.set()
        await leaving
        await ended(transport, running, late)
        running.answer()


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
