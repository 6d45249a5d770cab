"""Batches of several requests in a real scheduler: together while all goes well, and each for itself otherwise."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from random import Random
from typing import Any
from weakref import ref

import numpy as np
import pytest

from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import Sent, busy, serving, until
from vernier.border.batch import Answer, RequestBatch
from vernier.errors import (
    DeadlineExceeded,
    DeviceFailed,
    Draining,
    EngineError,
    NotReady,
    QueueFull,
    VernierError,
)
from vernier.serving.queueing.admission import Policy

#: Rows of requests that differ in them; together a full batch.
MIXED = (1, 2, 1, 3, 1)


def rows_of(count: int, rows: int | Sequence[int]) -> list[int]:
    return [rows] * count if isinstance(rows, int) else [rows[i % len(rows)] for i in range(count)]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, MIXED])
async def test_all_get_their_own_rows_in_full_batches(
    rows: int | Sequence[int], inline: bool, exact: bool, fresh: bool
) -> None:
    executor = ArithmeticExecutor(fresh=fresh, exact_batch=exact)
    async with serving(executor, inline=inline, slots=2) as scheduler:
        sent = Sent(*rows_of(30, rows))
        scheduler.submit(sent.batch)
        if not inline:
            assert (scheduler.inflight, scheduler.queued) == (30, 30)
        await until(lambda: scheduler.inflight == 0)
        for at in range(30):
            sent.answer(at)
        assert sum(sent.answers) == 30
        if exact:
            fit = 8 // rows if isinstance(rows, int) else len(rows)
            assert len(executor.ran) == len(sent.answers) == -(-30 // fit)
        metrics = scheduler._metrics
        assert metrics.totals()["answered"] == 30
        assert metrics.serving("fp32", "onnxruntime").requests == 30
        assert sum(metrics.serving("fp32", "onnxruntime").queue.counts) == 30
        assert sent.releases == 1


async def test_batches_share_executions() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        await busy(scheduler, executor)
        sent = [Sent(1, 2), Sent(2, 2, 2), Sent(1)]
        for one in sent:
            scheduler.submit(one.batch)
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert [len(batch) for batch in executor.ran] == [1, 7, 3]
        assert [one.answers for one in sent] == [[2], [2, 1], [1]]
        for one in sent:
            for at in range(len(one.ends)):
                one.answer(at)


@pytest.mark.parametrize("inline", [True, False])
async def test_large_requests_among_others_are_split_and_put_together(inline: bool) -> None:
    async with serving(ArithmeticExecutor(), inline=inline, slots=2) as scheduler:
        sent = Sent(1, 20, 3, 9, 8, 1)
        scheduler.submit(sent.batch)
        await until(lambda: scheduler.inflight == 0)
        for at in range(6):
            sent.answer(at)
        assert sent.releases == 1


async def test_as_many_are_admitted_as_there_is_room_for() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, policy=Policy(queue_limit=3), largest=1) as scheduler:
        await busy(scheduler, executor)
        sent, late = Sent(*[1] * 5), Sent(1, 1)
        scheduler.submit(sent.batch)
        assert sent.kinds == [None] * 3 + [QueueFull] * 2
        assert scheduler.inflight == 4
        scheduler.submit(late.batch)
        assert (late.kinds, late.releases) == ([QueueFull] * 2, 1)
        assert late.error(0) is late.error(1)
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert sent.kinds == [Answer] * 3 + [QueueFull] * 2
        assert sent.releases == 1
    left = Sent(1, 1)
    scheduler.submit(left.batch)
    assert (left.kinds, left.releases) == ([Draining] * 2, 1)


async def test_smaller_ones_are_admitted_where_larger_ones_would_be_late() -> None:
    """Those that are refused stand between those that are not."""
    executor = ArithmeticExecutor()
    async with serving(executor, policy=Policy(objective_s=0.5)) as scheduler:
        await busy(scheduler, executor)
        scheduler._batcher.learn_variant("fp32", True, {1: 0.1, 8: 0.8})
        sent = Sent(1, 6, 1, 6, 1)
        scheduler.submit(sent.batch)
        assert sent.kinds == [None, QueueFull, None, QueueFull, None]
        assert "500 ms allowed" in sent.error(1).message
        assert scheduler._metrics._rejected == {"deadline": 2}
        assert (scheduler.queued, scheduler._queue.rows, scheduler.inflight) == (3, 3, 4)
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        for at in (0, 2, 4):
            sent.answer(at)


@pytest.mark.parametrize("rows", [1, MIXED])
@pytest.mark.parametrize("running", [False, True])
async def test_one_that_is_cancelled_costs_the_others_nothing(
    running: bool, rows: int | Sequence[int]
) -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        executor.gate.clear()
        if not running:
            await busy(scheduler, executor)
        sent = Sent(*rows_of(5, rows))
        scheduler.submit(sent.batch)
        if running:
            await until(lambda: len(executor.ran) == 1)
        for at in (0, 3):
            scheduler.cancel(sent.batch, at)
            scheduler.cancel(sent.batch, at)  # nothing happens
        assert scheduler.inflight == (3 if running else 4)
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert sent.kinds == [None, Answer, Answer, None, Answer]
        for at in (1, 2, 4):
            sent.answer(at)
        assert scheduler._metrics.totals()["cancelled"] == 2
        left = sum(sent.batch.rows[at] for at in (1, 2, 4))
        # what runs is computed, what waits is not
        assert len(executor.ran[-1]) == (sum(sent.batch.rows) if running else left)
        scheduler.cancel(sent.batch, 1)  # it has its answer
        assert scheduler._metrics.totals()["cancelled"] == 2
        assert sent.releases == 1


async def test_a_batch_that_all_have_left_is_released_when_nothing_reads_it() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        executor.gate.clear()
        running, waiting = Sent(1, 1, 1), Sent(1, 1, 1)
        scheduler.submit(running.batch)
        await until(lambda: len(executor.ran) == 1)
        scheduler.submit(waiting.batch)
        for at in range(3):
            scheduler.cancel(running.batch, at)
            scheduler.cancel(waiting.batch, at)
        assert scheduler.inflight == 0
        assert (running.releases, waiting.releases) == (0, 1)
        executor.gate.set()
        await scheduler.predict(Sent().inputs[0], rows=1)
        assert (running.kinds, running.releases, waiting.releases) == ([None] * 3, 1, 1)


@pytest.mark.parametrize("soon", [0.05, 29.0])
@pytest.mark.parametrize("where", ["waiting", "running"])
async def test_each_expires_at_its_own_deadline(where: str, soon: float) -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        executor.gate.clear()
        if where == "waiting":
            await busy(scheduler, executor)
        now = asyncio.get_running_loop().time()
        sent = Sent(
            1,
            1,
            1,
            deadlines=[now + 0.09, now + 0.087, now + 0.09] if soon > 1 else [now + 30, now + soon, now + 30],
        )
        scheduler.submit(sent.batch)
        await until(lambda: bool(sent.ends[1]))
        assert isinstance(sent.error(1), DeadlineExceeded)
        if soon > 1:  # they are nearly one, and so waited together
            await until(lambda: scheduler.inflight == (1 if where == "waiting" else 0))
            assert sent.kinds == [DeadlineExceeded] * 3
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        if soon < 1:
            sent.answer(0)
            sent.answer(2)
        await until(lambda: sent.releases == 1)


async def test_those_whose_deadlines_are_far_from_each_other_do_not_wait_together() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=2) as scheduler:
        await busy(scheduler, executor)
        now = asyncio.get_running_loop().time()
        patient = Sent(1, 1, 1, 1, deadlines=[now + 40, now + 20, now + 20.1, now + 40])
        scheduler.submit(patient.batch)
        order: list[range] = []
        answered = patient.answered

        def noted(batch: RequestBatch, requests: range, answer: Answer) -> None:
            order.append(requests)
            answered(batch, requests, answer)

        patient.answered = noted  # type: ignore[method-assign]
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert order == [range(1, 3), range(1), range(3, 4)]


async def test_what_comes_too_late_is_told_so_and_the_others_get_their_answers() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        executor.gate.clear()
        now = asyncio.get_running_loop().time()
        sent = Sent(1, 1, 1, deadlines=[now + 30, now + 0.2, now + 30])
        scheduler.submit(sent.batch)
        await until(lambda: len(executor.ran) == 1)
        while asyncio.get_running_loop().time() < now + 0.2:
            pass  # the loop is held up, so that no timer ends it in time
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert sent.kinds == [Answer, DeadlineExceeded, Answer]
        sent.answer(2)


@pytest.mark.parametrize("rows", [1, MIXED])
async def test_only_the_guilty_one_of_a_failing_batch_fails(rows: int | Sequence[int]) -> None:
    def fault(batch: np.ndarray) -> None:
        if (batch[:, 0] == 200).any():
            raise EngineError("no")

    executor = ArithmeticExecutor(fault=fault)
    async with serving(executor) as scheduler:
        sent = Sent(*rows_of(4, rows))
        scheduler.submit(sent.batch)
        await until(lambda: scheduler.inflight == 0)
        assert sent.kinds == [Answer, Answer, EngineError, Answer]
        for at in (0, 1, 3):
            sent.answer(at)
        assert scheduler._metrics.totals()["failed"] == 1
        assert sent.releases == 1


@pytest.mark.parametrize("with_company", [False, True])
async def test_an_innocent_one_does_not_fail_because_the_others_have_left(with_company: bool) -> None:
    def fault(batch: np.ndarray) -> None:
        if (batch[:, 0] == 0).any():
            raise EngineError("no")

    executor = ArithmeticExecutor(fault=fault)
    async with serving(executor) as scheduler:
        executor.gate.clear()
        sent, innocent = Sent(1, 1), Sent(1, start=500.0)
        scheduler.submit(sent.batch)
        if with_company:
            scheduler.submit(innocent.batch)
        await until(lambda: len(executor.ran) == 1)
        scheduler.cancel(sent.batch, 0)
        if with_company:
            scheduler.cancel(sent.batch, 1)
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        if with_company:
            innocent.answer()
        else:
            sent.answer(1)


async def test_a_lost_device_fails_all() -> None:
    def fault(batch: np.ndarray) -> None:
        raise DeviceFailed("gone")

    async with serving(ArithmeticExecutor(fault=fault)) as scheduler:
        sent = Sent(1, 1, 1, 1)
        scheduler.submit(sent.batch)
        await until(lambda: scheduler.inflight == 0)
        assert (sent.kinds, sent.releases) == ([DeviceFailed] * 4, 1)


async def test_a_device_lost_to_the_first_of_a_batch_refuses_the_rest() -> None:
    def fault(batch: np.ndarray) -> None:
        raise DeviceFailed("gone")

    async with serving(ArithmeticExecutor(fault=fault), inline=True) as scheduler:

        class Meddling(Sent):
            def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
                super().failed(batch, requests, error)
                scheduler.cancel(batch, len(batch) - 1)

        sent = Meddling(*[1] * 20)
        scheduler.submit(sent.batch)
        assert sent.kinds == [DeviceFailed] * 8 + [NotReady] * 12
        assert (sent.releases, scheduler.inflight) == (1, 0)


@pytest.mark.parametrize("rows", [1, MIXED])
@pytest.mark.parametrize("fresh", [True, False])
async def test_only_what_strays_is_computed_anew(fresh: bool, rows: int | Sequence[int]) -> None:
    reduced = ArithmeticExecutor("int8", spoil=lambda batch: batch[:, 0] == 200, fresh=fresh)
    safe = ArithmeticExecutor(fresh=fresh)
    async with serving(reduced, safe) as scheduler:
        sent = Sent(*rows_of(4, rows))
        scheduler.submit(sent.batch)
        await until(lambda: scheduler.inflight == 0)
        assert [sent.answer(at).precision for at in range(4)] == ["int8", "int8", "fp32", "int8"]
        assert [len(batch) for batch in safe.ran] == [sent.batch.rows[2]]
        assert sent.releases == 1


async def test_a_split_request_of_which_a_part_strays_is_computed_anew_as_a_whole() -> None:
    reduced = ArithmeticExecutor("int8", spoil=lambda batch: batch[:, 0] == 0)
    async with serving(reduced, ArithmeticExecutor(), largest=2) as scheduler:
        sent = Sent(6)
        scheduler.submit(sent.batch)
        await until(lambda: scheduler.inflight == 0)
        assert sent.answer().precision == "fp32"
        assert scheduler.queued == scheduler._queue.rows == 0
        assert sent.releases == 1


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("rows", [1, MIXED])
@pytest.mark.parametrize("share", [0.25, 1.0])
async def test_the_tap_sees_copies_of_its_share(
    share: float, rows: int | Sequence[int], inline: bool
) -> None:
    async with serving(ArithmeticExecutor(), inline=inline) as scheduler:
        seen: list[tuple[Any, Any]] = []
        scheduler.set_tap(lambda inputs, outputs, precision: seen.append((inputs, outputs)), share)
        sent = [Sent(*rows_of(8, rows)), *[Sent(1, start=100.0 * i) for i in range(8)]]
        for one in sent:
            scheduler.submit(one.batch)
        await until(lambda: scheduler.inflight == 0)
        assert len(seen) == 16 * share
        for one in sent:
            one.batch.inputs["x"][:] = -1.0  # the memory is used again
        for inputs, outputs in seen:
            assert inputs["x"].shape == outputs["y"].shape
            np.testing.assert_array_equal(outputs["y"], 2 * inputs["x"])
        if share == 1.0:
            assert sorted(float(inputs["x"][0, 0]) for inputs, _ in seen) == sorted(
                [100.0 * i for i in range(8)] * 2
            )
            assert sorted(len(inputs["x"]) for inputs, _ in seen) == sorted(rows_of(8, rows) + [1] * 8)


async def test_those_that_wait_follow_a_change_of_the_variant() -> None:
    reduced, safe = ArithmeticExecutor("int8"), ArithmeticExecutor()
    async with serving(reduced, safe) as scheduler:
        reduced.gate.clear()
        first = Sent(*[1] * 8)
        scheduler.submit(first.batch)
        await until(lambda: len(reduced.ran) == 1)
        second = Sent(1, 1, 20, 1)
        scheduler.submit(second.batch)
        scheduler.set_precision("fp32")
        reduced.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert {second.answer(at).precision for at in range(4)} == {"fp32"}
        assert (first.releases, second.releases) == (1, 1)


async def test_one_that_comes_back_to_its_lane_expires_once() -> None:
    reduced, safe = ArithmeticExecutor("int8"), ArithmeticExecutor()
    async with serving(reduced, safe) as scheduler:
        safe.gate.clear()
        await busy(scheduler, reduced)
        now = asyncio.get_running_loop().time()
        scheduler.submit(Sent(precision="int8", deadlines=[now + 30.0]).batch)  # keeps the lane
        sent = Sent(1, 1, 1, deadlines=[now + 0.1] * 3)
        scheduler.submit(sent.batch)
        scheduler.set_precision("fp32")
        scheduler.set_precision("int8")
        await until(lambda: all(sent.ends))
        assert sent.kinds == [DeadlineExceeded] * 3
        reduced.gate.set()
        safe.gate.set()
        await until(lambda: scheduler.inflight == 0)


@pytest.mark.parametrize("why", ["refused", "refused partly", "cancelled"])
async def test_what_is_not_computed_is_not_kept(why: str) -> None:
    """The arrays are of the memory of large bodies: they must not wait for the garbage collector."""
    executor = ArithmeticExecutor()
    policy = Policy(queue_limit={"refused": 1, "refused partly": 3, "cancelled": 100}[why])
    async with serving(executor, policy=policy) as scheduler:
        await busy(scheduler, executor)
        scheduler.submit(Sent().batch)
        gc.collect()
        gc.disable()
        try:
            sent = Sent(1, 1, 1, 1)
            batch = sent.batch
            array = ref(batch.inputs["x"])
            del sent.batch
            sent.answered = sent.failed = sent.released = lambda *told: None  # type: ignore[method-assign]
            scheduler.submit(batch)
            if why == "cancelled":
                for at in range(4):
                    scheduler.cancel(batch, at)
                assert scheduler.queued == 1
            else:
                executor.gate.set()
                await until(lambda: scheduler.inflight == 0)
            del batch
            await until(lambda: array() is None)  # the worker may hold its last batch for a moment
            executor.gate.set()
        finally:
            gc.enable()


async def test_a_drain_that_runs_out_of_time_fails_all() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=2) as scheduler:
        executor.gate.clear()
        sent = Sent(1, 1, 1, 5, 1, 1)
        scheduler.submit(sent.batch)
        await until(lambda: len(executor.ran) == 1)
        await scheduler.drain(0.1)
        assert (sent.kinds, sent.releases) == ([Draining] * 6, 0)
        executor.gate.set()
        await until(lambda: sent.releases == 1)


async def test_what_a_target_is_told_comes_in_order_whatever_it_does_meanwhile() -> None:
    """Told of the first request, it cancels one that waits, and submits another batch."""
    executor = ArithmeticExecutor()
    async with serving(executor, largest=2, inline=True) as scheduler:
        told: list[str] = []

        class Meddling(Sent):
            def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
                told.append(f"answered {requests.start}")
                super().answered(batch, requests, answer)
                if requests.start == 0:
                    scheduler.cancel(batch, 3)
                    scheduler.submit(other.batch)

            def released(self, batch: RequestBatch) -> None:
                told.append("released")
                super().released(batch)

        sent, other = Meddling(2, 1, 1, 9, 1), Sent()
        scheduler.submit(sent.batch)
        await until(lambda: scheduler.inflight == 0)
        assert sent.kinds == [Answer, Answer, Answer, None, Answer]
        other.answer()
        assert told == ["answered 0", "answered 1", "answered 4", "released"]


@pytest.mark.parametrize("seed", range(20))
async def test_random_batches_end_once_and_right_whatever_befalls_them(seed: int) -> None:
    """Rows that differ, deadlines, cancellations, failures and stray outputs, with real threads."""
    random = Random(seed)
    bad, stray = 1e6, 2e6  # the first numbers of requests that fail, and of those whose reduced output strays

    def fault(batch: np.ndarray) -> None:
        if ((batch[:, 0] >= bad) & (batch[:, 0] < stray)).any():
            raise EngineError("no")

    reduced = ArithmeticExecutor(
        "int8", fault=fault, spoil=lambda rows: rows[:, 0] >= stray, fresh=seed % 2 == 0
    )
    safe = ArithmeticExecutor(fault=fault)
    policy = Policy(queue_limit=random.choice([40, 1000]))
    inline = random.random() < 0.5
    async with serving(reduced, safe, slots=2, policy=policy, inline=inline) as scheduler:
        loop, sent = asyncio.get_running_loop(), []
        cancelled: set[tuple[int, int]] = set()
        for number in range(40):
            each = [random.choice([1, 1, 1, 2, 3, 8, 9, 20]) for _ in range(random.choice([1, 1, 5, 20]))]
            now = loop.time()
            deadlines = [now + random.choice([0.0, 0.001, 0.005, 5.0]) for _ in each]
            start = random.choice([0.0] * 6 + [bad, stray])
            one = Sent(*each, start=start, deadlines=random.choice([None, None, deadlines]))
            sent.append(one)
            scheduler.submit(one.batch)
            for at in range(len(each)):
                if random.random() < 0.1 and not one.ends[at]:
                    scheduler.cancel(one.batch, at)
                    cancelled.add((number, at))
            if random.random() < 0.5:
                await asyncio.sleep(random.choice([0, 0, 0.002]))
            if random.random() < 0.1:
                scheduler.set_precision(random.choice(["int8", "fp32"]))
        await until(lambda: scheduler.inflight == 0 and all(one.releases for one in sent))
        kinds: set[type | None] = set()
        for number, one in enumerate(sent):
            assert one.releases == 1
            allowed = {Answer, DeadlineExceeded, QueueFull}
            first = one.inputs[0]["x"][0, 0]
            for at, kind in enumerate(one.kinds):
                if (number, at) in cancelled:
                    assert kind is None
                    continue
                assert kind in (allowed | {EngineError} if bad <= first < stray else allowed)
                if kind is Answer:
                    answer = one.answer(at)
                    assert first < bad or (first >= stray and answer.precision == "fp32")
            kinds.update(one.kinds)
        assert Answer in kinds
