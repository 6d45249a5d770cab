"""Groups of requests in a real scheduler: together while all goes well, and each for itself otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Sequence
from typing import Any
from weakref import ref

import numpy as np
import pytest

from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import Recorded, busy, serving, until, x
from vernier.errors import DeadlineExceeded, DeviceFailed, Draining, EngineError, QueueFull
from vernier.serving.admission import Policy
from vernier.serving.request import ENDED, RUNNING
from vernier.serving.simulate import group_of

#: Rows of requests that differ in them; together a full batch.
MIXED = (1, 2, 1, 3, 1)


def recorded(count: int, rows: int | Sequence[int] = 1, **more: Any) -> list[Recorded]:
    each = [rows] * count if isinstance(rows, int) else [rows[i % len(rows)] for i in range(count)]
    return [Recorded(x(own, 100.0 * i), own, **more) for i, own in enumerate(each)]


def assert_answered(requests: list[Recorded]) -> None:
    """Each once, with the answer to its own numbers."""
    for request in requests:
        ((answer, error),) = request.ends
        assert error is None
        assert answer is not None
        np.testing.assert_array_equal(answer.outputs["y"], 2 * request.inputs["x"])


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, MIXED])
async def test_all_get_their_own_rows_in_full_batches(
    rows: int | Sequence[int], inline: bool, exact: bool, fresh: bool
) -> None:
    executor = ArithmeticExecutor(fresh=fresh, exact_batch=exact)
    async with serving(executor, inline=inline, slots=2) as scheduler:
        requests = recorded(30, rows)
        scheduler.submit(group_of(requests))
        assert (scheduler.inflight, scheduler.queued) == (30, 30)
        await until(lambda: scheduler.inflight == 0)
        assert_answered(requests)
        if exact and not inline:
            fit = 8 // rows if isinstance(rows, int) else len(rows)
            assert len(executor.ran) == -(-30 // fit)
        metrics = scheduler._metrics
        assert metrics.totals()["answered"] == 30
        assert metrics.serving("fp32", "onnxruntime").requests == 30
        assert sum(metrics.serving("fp32", "onnxruntime").queue.counts) == 30


async def test_as_many_are_admitted_as_there_is_room_for() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, policy=Policy(queue_limit=3), largest=1) as scheduler:
        await busy(scheduler, executor)
        requests = recorded(5)
        group = group_of(requests)
        with pytest.raises(QueueFull):
            scheduler.submit(group)
        assert (group.count, group.requests, scheduler.inflight) == (3, requests[:3], 4)
        late = recorded(2)
        with pytest.raises(QueueFull):
            scheduler.submit(group_of(late))
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert_answered(requests[:3])
        assert [r.ends for r in [*requests[3:], *late]] == [[]] * 4
    left = recorded(2)
    group = group_of(left)
    with pytest.raises(Draining):
        scheduler.submit(group)
    assert group.count == 0


async def test_smaller_ones_are_admitted_where_larger_ones_would_be_late() -> None:
    """Those that go stand between those that stay, in the group and in its numbers."""
    executor = ArithmeticExecutor()
    async with serving(executor, policy=Policy(objective_s=0.5)) as scheduler:
        await busy(scheduler, executor)
        scheduler._batcher.learn_variant("fp32", True, {1: 0.1, 8: 0.8})
        requests = recorded(5, (1, 6, 1, 6, 1))
        group = group_of(requests)
        with pytest.raises(QueueFull, match="500 ms allowed"):
            scheduler.submit(group)
        stay = [requests[at] for at in (0, 2, 4)]
        assert [r.group is group for r in requests] == [True, False, True, False, True]
        assert scheduler._metrics._rejected == {"deadline": 2}
        assert (group.count, group.rows, group.requests, scheduler.queued) == (3, 3, stay, 3)
        np.testing.assert_array_equal(group.inputs["x"], np.concatenate([r.inputs["x"] for r in stay]))
        assert scheduler.inflight == 4
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert_answered(stay)
        assert [requests[at].ends for at in (1, 3)] == [[]] * 2


@pytest.mark.parametrize("rows", [1, MIXED])
@pytest.mark.parametrize("running", [False, True])
async def test_one_that_is_cancelled_leaves_and_costs_the_others_nothing(
    running: bool, rows: int | Sequence[int]
) -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        executor.gate.clear()
        if not running:
            await busy(scheduler, executor)
        requests = recorded(5, rows)
        scheduler.submit(group_of(requests))
        if running:
            await until(lambda: len(executor.ran) == 1)
        for at in (0, 3):
            scheduler.cancel(requests[at])
            scheduler.cancel(requests[at])  # nothing happens
        assert scheduler.inflight == (3 if running else 4)
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert [len(r.ends) for r in requests] == [0, 1, 1, 0, 1]
        assert_answered([requests[at] for at in (1, 2, 4)])
        assert scheduler._metrics.totals()["cancelled"] == 2
        left = sum(requests[at].rows for at in (1, 2, 4))
        all_rows = sum(request.rows for request in requests)
        # what runs is computed, what waits is not
        assert len(executor.ran[-1]) == (all_rows if running else left)
        scheduler.cancel(requests[1])  # it has its answer
        assert scheduler._metrics.totals()["cancelled"] == 2


async def test_a_group_that_all_have_left_ends() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        executor.gate.clear()
        requests = recorded(3)
        group = group_of(requests)
        scheduler.submit(group)
        await until(lambda: len(executor.ran) == 1)
        for request in requests:
            scheduler.cancel(request)
        assert (group.state, scheduler.inflight) == (ENDED, 0)
        executor.gate.set()
        await scheduler.predict(x(), rows=1)
        assert [r.ends for r in requests] == [[]] * 3


@pytest.mark.parametrize("where", ["waiting", "running"])
async def test_each_expires_at_its_own_deadline(where: str) -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        executor.gate.clear()
        if where == "waiting":
            await busy(scheduler, executor)
        now = asyncio.get_running_loop().time()
        requests = [Recorded(x(1, i), 1, deadline=now + (0.05 if i == 1 else 30.0)) for i in range(3)]
        scheduler.submit(group_of(requests))
        await until(lambda: bool(requests[1].ends))
        ((answer, error),) = requests[1].ends
        assert answer is None
        assert isinstance(error, DeadlineExceeded)
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert_answered([requests[0], requests[2]])


def test_the_deadline_of_a_group_is_that_of_the_first_that_is_left() -> None:
    requests = [Recorded(x(), 1, deadline=at) for at in (3.0, 1.0, 2.0)]
    group = group_of(requests)
    group.state = RUNNING
    assert group.deadline == 1.0
    assert group.release_overdue(0.9) == []
    assert group.release_overdue(1.5) == [requests[1]]
    assert (group.deadline, group.count, requests[1].deadline) == (2.0, 2, 1.0)
    group.release(requests[2])
    assert (group.deadline, group.state) == (3.0, RUNNING)
    assert group.dissolve() == [requests[0]]
    assert (group.deadline, group.count, group.state) == (None, 0, ENDED)


async def test_what_comes_too_late_is_told_so_and_the_others_get_their_answers() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        executor.gate.clear()
        now = asyncio.get_running_loop().time()
        requests = [Recorded(x(1, i), 1, deadline=now + (0.2 if i == 1 else 30.0)) for i in range(3)]
        scheduler.submit(group_of(requests))
        await until(lambda: len(executor.ran) == 1)
        while asyncio.get_running_loop().time() < now + 0.2:
            pass  # the loop is held up, so that no timer ends it in time
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert isinstance(requests[1].ends[0][1], DeadlineExceeded)
        assert_answered([requests[0], requests[2]])


@pytest.mark.parametrize("rows", [1, MIXED])
async def test_only_the_guilty_one_of_a_failing_batch_fails(rows: int | Sequence[int]) -> None:
    def fault(batch: np.ndarray) -> None:
        if (batch[:, 0] == 200).any():
            raise EngineError("no")

    executor = ArithmeticExecutor(fault=fault)
    async with serving(executor) as scheduler:
        requests = recorded(4, rows)
        scheduler.submit(group_of(requests))
        await until(lambda: scheduler.inflight == 0)
        assert_answered([requests[at] for at in (0, 1, 3)])
        assert isinstance(requests[2].ends[0][1], EngineError)
        assert scheduler._metrics.totals()["failed"] == 1


@pytest.mark.parametrize("with_company", [False, True])
async def test_an_innocent_one_does_not_fail_because_the_others_have_left(with_company: bool) -> None:
    def fault(batch: np.ndarray) -> None:
        if (batch[:, 0] == 0).any():
            raise EngineError("no")

    executor = ArithmeticExecutor(fault=fault)
    async with serving(executor) as scheduler:
        executor.gate.clear()
        requests, innocent = recorded(2), Recorded(x(1, 500.0), 1)
        scheduler.submit(group_of(requests))
        if with_company:
            scheduler.submit(innocent)
        await until(lambda: len(executor.ran) == 1)
        scheduler.cancel(requests[0])
        if with_company:
            scheduler.cancel(requests[1])
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert_answered([innocent] if with_company else requests[1:])


async def test_a_lost_device_fails_all() -> None:
    def fault(batch: np.ndarray) -> None:
        raise DeviceFailed("gone")

    async with serving(ArithmeticExecutor(fault=fault)) as scheduler:
        requests = recorded(4)
        scheduler.submit(group_of(requests))
        await until(lambda: scheduler.inflight == 0)
        assert [type(r.ends[0][1]) for r in requests] == [DeviceFailed] * 4


@pytest.mark.parametrize("rows", [1, MIXED])
@pytest.mark.parametrize("fresh", [True, False])
async def test_only_what_strays_is_computed_anew(fresh: bool, rows: int | Sequence[int]) -> None:
    reduced = ArithmeticExecutor("int8", spoil=lambda batch: batch[:, 0] == 200, fresh=fresh)
    safe = ArithmeticExecutor(fresh=fresh)
    async with serving(reduced, safe) as scheduler:
        requests = recorded(4, rows)
        scheduler.submit(group_of(requests))
        await until(lambda: scheduler.inflight == 0)
        assert_answered(requests)
        assert [r.ends[0][0].precision for r in requests if r.ends[0][0]] == ["int8", "int8", "fp32", "int8"]
        assert [len(batch) for batch in safe.ran] == [requests[2].rows]


async def test_a_split_request_of_which_a_part_strays_is_computed_anew_as_a_whole() -> None:
    reduced = ArithmeticExecutor("int8", spoil=lambda batch: batch[:, 0] == 0)
    async with serving(reduced, ArithmeticExecutor(), largest=2) as scheduler:
        request = Recorded(x(6), 6)
        scheduler.submit(request)
        await until(lambda: scheduler.inflight == 0)
        assert_answered([request])
        assert scheduler.queued == scheduler._queue.rows == 0


@pytest.mark.parametrize("share", [0.25, 1.0])
async def test_the_tap_sees_its_share(share: float) -> None:
    async with serving(ArithmeticExecutor()) as scheduler:
        seen: list[tuple[Any, Any]] = []
        scheduler.set_tap(lambda inputs, outputs, precision: seen.append((inputs, outputs)), share)
        scheduler.submit(group_of(recorded(8)))
        for request in recorded(8):
            scheduler.submit(request)
        await until(lambda: scheduler.inflight == 0)
        assert len(seen) == 16 * share
        for inputs, outputs in seen:
            assert inputs["x"].shape == (1, 2)
            np.testing.assert_array_equal(outputs["y"], 2 * inputs["x"])
        if share == 1.0:
            assert sorted(float(inputs["x"][0, 0]) for inputs, _ in seen) == sorted(
                [100.0 * i for i in range(8)] * 2
            )


async def test_those_that_wait_follow_a_change_of_the_variant() -> None:
    reduced, safe = ArithmeticExecutor("int8"), ArithmeticExecutor()
    async with serving(reduced, safe) as scheduler:
        reduced.gate.clear()
        first = recorded(8)
        scheduler.submit(group_of(first))
        await until(lambda: len(reduced.ran) == 1)
        requests = recorded(4)
        scheduler.submit(group_of(requests))
        scheduler.set_precision("fp32")
        reduced.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert_answered([*first, *requests])
        assert {r.ends[0][0].precision for r in requests if r.ends[0][0]} == {"fp32"}


async def test_one_that_comes_back_to_its_lane_expires_once() -> None:
    reduced, safe = ArithmeticExecutor("int8"), ArithmeticExecutor()
    async with serving(reduced, safe) as scheduler:
        safe.gate.clear()
        await busy(scheduler, reduced)
        now = asyncio.get_running_loop().time()
        scheduler.submit(Recorded(x(), 1, precision="int8", deadline=now + 30.0))  # keeps the lane
        requests = recorded(3, deadline=now + 0.1)
        scheduler.submit(group_of(requests))
        scheduler.set_precision("fp32")
        scheduler.set_precision("int8")
        await until(lambda: all(r.ends for r in requests))
        assert [type(r.ends[0][1]) for r in requests] == [DeadlineExceeded] * 3
        reduced.gate.set()
        safe.gate.set()
        await until(lambda: scheduler.inflight == 0)


async def test_one_that_cannot_be_told_does_not_cost_the_others_their_answers() -> None:
    class Deaf(Recorded):
        def done(self, answer: Any, error: Any) -> None:
            raise RuntimeError("nobody is there")

    async with serving(ArithmeticExecutor()) as scheduler:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        requests = [Recorded(x(), 1), Deaf(x(), 1), Recorded(x(), 1)]
        scheduler.submit(group_of(requests))
        await until(lambda: scheduler.inflight == 0)
        assert_answered([requests[0], requests[2]])
        assert [type(context["exception"]) for context in reported] == [RuntimeError]


@pytest.mark.parametrize("why", ["refused", "refused partly", "cancelled"])
async def test_what_is_not_computed_is_not_kept(why: str) -> None:
    """The arrays are of the memory of large bodies: they must not wait for the garbage collector."""
    executor = ArithmeticExecutor()
    policy = Policy(queue_limit={"refused": 0, "refused partly": 2, "cancelled": 100}[why])
    async with serving(executor, policy=policy) as scheduler:
        if why == "cancelled":
            await busy(scheduler, executor)
            scheduler.submit(Recorded(x(), 1))
        gc.collect()
        gc.disable()
        try:
            requests = recorded(4)
            group = group_of(requests)
            array = ref(group.inputs["x"])
            with contextlib.suppress(QueueFull):
                scheduler.submit(group)
            del group
            if why == "cancelled":
                for request in requests:
                    scheduler.cancel(request)
                assert scheduler.queued == 1  # behind that one they were, and may stand there as tombstones
            else:
                await until(lambda: scheduler.inflight == 0)
            await until(lambda: array() is None)  # the worker may hold its last batch for a moment
            executor.gate.set()
        finally:
            gc.enable()


async def test_a_drain_that_runs_out_of_time_fails_all() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=2) as scheduler:
        executor.gate.clear()
        requests = recorded(6)
        scheduler.submit(group_of(requests))
        await until(lambda: len(executor.ran) == 1)
        opening = asyncio.get_running_loop().call_later(0.3, executor.gate.set)
        await scheduler.drain(0.1)
        opening.cancel()
        assert [type(r.ends[0][1]) for r in requests] == [Draining] * 6
