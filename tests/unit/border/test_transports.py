"""One contract for both ways of a batch to the scheduler: a call, and the border between processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.support.border import Transport, stall, transported
from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import Sent, until, z_of
from tests.support.transported import Poisoned, ended
from vernier.border.batch import Answer, RequestBatch
from vernier.errors import DeadlineExceeded, Draining, EngineError, QueueFull, UnsupportedPrecision
from vernier.serving.queueing.admission import Policy

Make = Callable[..., AbstractAsyncContextManager[Transport]]


@pytest.fixture(params=["process", "border"])
def make(request: pytest.FixtureRequest) -> Make:
    return partial(transported, request.param)


@pytest.fixture
def border() -> Make:
    return partial(transported, "border")


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
