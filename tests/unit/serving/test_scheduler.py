"""The shell with real threads and a real loop; the policy itself is tested in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from tests.support.engines import ArithmeticExecutor
from tests.support.scheduling import Recorded, busy, serving, until, x, z_of
from vernier.errors import (
    DeadlineExceeded,
    DeviceFailed,
    Draining,
    EngineError,
    NotReady,
    QueueFull,
    VernierError,
)
from vernier.metrics import ModelMetrics
from vernier.serving.admission import Policy
from vernier.serving.padding import BatchLayout
from vernier.serving.request import JoinedRequests
from vernier.serving.scheduler import Answer, Scheduler
from vernier.serving.sharing import Device

Start = Callable[..., Awaitable[Scheduler]]


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("exact", [True, False])
async def test_everyone_gets_their_own_rows(inline: bool, fresh: bool, exact: bool) -> None:
    executor = ArithmeticExecutor(fresh=fresh, exact_batch=exact)
    async with serving(executor, inline=inline, slots=2) as scheduler:
        inputs = [x(rows, 100.0 * i) for i, rows in enumerate([1, 3, 8, 2, 1, 20, 5, 1, 64, 7] * 5)]
        answers = await asyncio.gather(*(scheduler.predict(i, rows=len(i["x"])) for i in inputs))
        for sent, answer in zip(inputs, answers, strict=True):
            np.testing.assert_array_equal(answer.outputs["y"], 2 * sent["x"])
            np.testing.assert_array_equal(answer.outputs["z"], z_of(sent))
            assert answer.precision == "fp32"
            assert 1 <= answer.batch_size <= 8
            assert answer.queue_s >= 0
            assert answer.compute_s > 0
        assert len(executor.ran) < len(inputs) + 30
        assert all(batch.shape[0] <= 8 for batch in executor.ran)
        if not exact:
            assert {batch.shape[0] for batch in executor.ran} <= {1, 2, 4, 8}


async def test_only_the_asked_outputs_are_answered() -> None:
    async with serving(ArithmeticExecutor()) as scheduler:
        answer = await scheduler.predict(x(), rows=1, outputs=["z"])
        assert list(answer.outputs) == ["z"]


async def test_what_arrives_together_runs_together() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor) as scheduler:
        await asyncio.gather(*(scheduler.predict(x(), rows=1) for _ in range(8)))
        assert [batch.shape[0] for batch in executor.ran] == [8]


async def test_a_lone_request_does_not_wait_for_company() -> None:
    async with serving(ArithmeticExecutor(), policy=Policy(max_queue_delay_s=10.0)) as scheduler:
        began = time.monotonic()
        await scheduler.predict(x(), rows=1)
        assert time.monotonic() - began < 1.0


async def test_done_is_called_exactly_once_and_may_submit_the_next_request() -> None:
    async with serving(ArithmeticExecutor(), inline=True) as scheduler:
        chain: list[Recorded] = []

        class Link(Recorded):
            def done(self, answer: Answer | None, error: VernierError | None) -> None:
                super().done(answer, error)
                if len(chain) < 100:
                    chain.append(Link(x(), 1))
                    scheduler.submit(chain[-1])

        chain.append(Link(x(), 1))
        scheduler.submit(chain[0])
        await until(lambda: len(chain) == 100 and scheduler.inflight == 0)
        assert [len(link.ends) for link in chain] == [1] * 100


async def test_a_fault_in_done_does_not_cost_the_others_their_answers() -> None:
    class Broken(Recorded):
        def done(self, answer: Answer | None, error: VernierError | None) -> None:
            super().done(answer, error)
            raise ZeroDivisionError

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    async with serving(ArithmeticExecutor()) as scheduler:
        requests = [Recorded(x(), 1), Broken(x(), 1), Recorded(x(), 1)]
        for request in requests:
            scheduler.submit(request)
        await until(lambda: scheduler.inflight == 0)
        assert [len(request.ends) for request in requests] == [1, 1, 1]
        assert isinstance(reported[0]["exception"], ZeroDivisionError)


# --- admission, deadlines, cancellation --------------------------------------------------------------
async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, policy=Policy(queue_limit=3), largest=1) as scheduler:
        running = await busy(scheduler, executor)
        waiting = [Recorded(x(), 1) for _ in range(3)]
        for request in waiting:
            scheduler.submit(request)
        refused = Recorded(x(), 1)
        with pytest.raises(QueueFull) as refusal:
            scheduler.submit(refused)
        assert refusal.value.retry_after_s > 0
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert [len(r.ends) for r in [running, *waiting, refused]] == [1, 1, 1, 1, 0]


async def test_joined_requests_run_at_once_and_each_is_counted() -> None:
    async with serving(ArithmeticExecutor(), inline=True) as scheduler:
        inputs = x(6, 10.0)
        answer = scheduler.run_joined(JoinedRequests(inputs, [2, 2, 2], ["y"]))
        assert answer is not None
        assert (list(answer.outputs), answer.batch_size, answer.precision) == (["y"], 6, "fp32")
        np.testing.assert_array_equal(answer.outputs["y"], 2 * inputs["x"])
        assert scheduler._metrics.totals() == {
            "admitted": 3,
            "answered": 3,
            "failed": 0,
            "expired": 0,
            "cancelled": 0,
        }
        assert scheduler._metrics.serving("fp32", "onnxruntime").requests == 3
        assert scheduler._metrics.serving("fp32", "onnxruntime").queue.counts[0] == 3


async def test_joined_requests_are_left_alone_where_each_must_wait_its_turn() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, inline=True) as scheduler:
        assert scheduler.run_joined(JoinedRequests(x(9), [1] * 9)) is None  # more than a batch holds
        waiting = Recorded(x(), 1)
        scheduler.submit(waiting)
        assert scheduler.run_joined(JoinedRequests(x(2), [1, 1])) is None  # it would overtake
        await until(lambda: scheduler.inflight == 0)
        assert len(executor.ran) == 1
    assert scheduler.run_joined(JoinedRequests(x(2), [1, 1])) is None
    async with serving(ArithmeticExecutor(), inline=False) as scheduler:
        assert scheduler.run_joined(JoinedRequests(x(2), [1, 1])) is None


async def test_joined_requests_that_fail_or_stray_are_not_counted() -> None:
    def fault(batch: np.ndarray) -> None:
        if (batch == 100).any():
            raise EngineError("no")

    reduced = ArithmeticExecutor("int8", spoil=lambda batch: batch[:, 0] == 2, fault=fault)
    async with serving(reduced, ArithmeticExecutor(), inline=True) as scheduler:
        assert scheduler.run_joined(JoinedRequests(x(2), [1, 1])) is None
        assert scheduler.run_joined(JoinedRequests(x(2, 99), [1, 1])) is None
        assert len(reduced.ran) == 2
        assert not any(scheduler._metrics.totals().values())


async def test_the_tap_sees_its_share_of_joined_requests() -> None:
    async with serving(ArithmeticExecutor(), inline=True) as scheduler:
        seen: list[tuple[Any, Any]] = []
        scheduler.set_tap(lambda inputs, outputs, precision: seen.append((inputs, outputs)), 0.25)
        for start in range(4):
            assert scheduler.run_joined(JoinedRequests(x(8, start), [2] * 4)) is not None
        assert len(seen) == 4
        for inputs, outputs in seen:
            assert inputs["x"].shape == (2, 2)
            np.testing.assert_array_equal(outputs["y"], 2 * inputs["x"])


async def test_the_tap_sees_joined_requests_as_they_were_whatever_their_rows() -> None:
    async with serving(ArithmeticExecutor(), inline=True) as scheduler:
        seen: list[tuple[Any, Any]] = []
        scheduler.set_tap(lambda inputs, outputs, precision: seen.append((inputs, outputs)), 1.0)
        whole = x(6, 10.0)
        assert scheduler.run_joined(JoinedRequests(whole, [1, 3, 2])) is not None
        assert [len(inputs["x"]) for inputs, _ in seen] == [1, 3, 2]
        np.testing.assert_array_equal(np.concatenate([inputs["x"] for inputs, _ in seen]), whole["x"])
        for inputs, outputs in seen:
            np.testing.assert_array_equal(outputs["y"], 2 * inputs["x"])


async def test_a_deadline_ends_waiting_and_running_requests_at_that_moment() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        now = asyncio.get_running_loop().time()
        running = Recorded(x(), 1, deadline=now + 0.05)
        scheduler.submit(running)
        await until(lambda: len(executor.ran) == 1)
        waiting = Recorded(x(), 1, deadline=now + 0.06)
        scheduler.submit(waiting)
        await until(lambda: scheduler.inflight == 0, timeout_s=1.0)
        for request in (running, waiting):
            ((answer, error),) = request.ends
            assert answer is None
            assert isinstance(error, DeadlineExceeded)
        executor.gate.set()
        await scheduler.predict(x(), rows=1)
        assert len(executor.ran) == 2, "the expired request was executed"


async def test_a_deadline_shorter_than_the_loops_timers_ends_a_running_request() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        request = Recorded(x(), 1, deadline=asyncio.get_running_loop().time() + 0.0005)
        scheduler.submit(request)
        await until(lambda: scheduler.inflight == 0, timeout_s=1.0)
        assert isinstance(request.ends[0][1], DeadlineExceeded)


@pytest.mark.parametrize("when", ["waiting", "running"])
async def test_a_cancelled_task_cancels_its_request(when: str) -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        first = asyncio.create_task(scheduler.predict(x(), rows=1))
        await until(lambda: len(executor.ran) == 1)
        second = asyncio.create_task(scheduler.predict(x(), rows=1))
        await until(lambda: scheduler.queued == 1)
        (first if when == "running" else second).cancel()
        await until(lambda: scheduler.inflight == 1)
        executor.gate.set()
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 1
        assert sum(isinstance(result, Answer) for result in results) == 1
        assert len(executor.ran) == (2 if when == "running" else 1)


async def test_cancel_after_the_end_and_twice_changes_nothing() -> None:
    async with serving(ArithmeticExecutor()) as scheduler:
        request = Recorded(x(), 1)
        scheduler.submit(request)
        await until(lambda: bool(request.ends))
        scheduler.cancel(request)
        other = Recorded(x(), 1)
        scheduler.submit(other)
        scheduler.cancel(other)
        scheduler.cancel(other)
        await until(lambda: scheduler.inflight == 0)
        assert other.ends == []


async def test_higher_priority_goes_first() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        order: list[int] = []

        class Noted(Recorded):
            def done(self, answer: Answer | None, error: VernierError | None) -> None:
                order.append(self.priority)

        scheduler.submit(Noted(x(), 1, priority=0))
        await until(lambda: len(executor.ran) == 1)
        for priority in (1, -3, 5, 2):
            scheduler.submit(Noted(x(), 1, priority=priority))
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        assert order == [0, 5, 2, 1, -3]


# --- variants -----------------------------------------------------------------------------------------
async def test_switching_the_variant_moves_what_waits_but_not_who_demanded_one() -> None:
    fp32, int8 = ArithmeticExecutor("fp32"), ArithmeticExecutor("int8")
    async with serving(fp32, int8, precision="int8", largest=4) as scheduler:
        int8.gate.clear()
        running = asyncio.create_task(scheduler.predict(x(), rows=1))
        await until(lambda: len(int8.ran) == 1)
        free = asyncio.create_task(scheduler.predict(x(), rows=1))
        bound = asyncio.create_task(scheduler.predict(x(), rows=1, precision="int8"))
        await until(lambda: scheduler.queued == 2)
        scheduler.set_precision("fp32")
        assert scheduler.precision == "fp32"
        int8.gate.set()
        answers = await asyncio.gather(running, free, bound)
        assert [answer.precision for answer in answers] == ["int8", "fp32", "int8"]
        assert (await scheduler.predict(x(), rows=1)).precision == "fp32"


async def test_an_unknown_variant_cannot_be_switched_to() -> None:
    async with serving(ArithmeticExecutor()) as scheduler:
        with pytest.raises(KeyError):
            scheduler.set_precision("fp8")


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("rows", [1, 20])
async def test_a_non_finite_output_of_a_reduced_variant_is_computed_again_at_fp32(
    inline: bool, rows: int
) -> None:
    int8 = ArithmeticExecutor("int8", spoil=lambda batch: batch[:, 0] >= 1000)
    fp32 = ArithmeticExecutor("fp32")
    async with serving(int8, fp32, inline=inline) as scheduler:
        bad = x(rows, 1002.0 - 2 * rows)
        good, spoiled = await asyncio.gather(
            scheduler.predict(x(2), rows=2), scheduler.predict(bad, rows=rows)
        )
        assert (good.precision, spoiled.precision) == ("int8", "fp32")
        np.testing.assert_array_equal(spoiled.outputs["y"], 2 * bad["x"])
        np.testing.assert_array_equal(spoiled.outputs["z"], z_of(bad, "fp32"))


async def test_what_fp32_computes_is_the_answer_even_when_it_is_not_finite() -> None:
    async with serving(ArithmeticExecutor("fp32", spoil=lambda batch: batch[:, 0] >= 0)) as scheduler:
        answer = await scheduler.predict(x(), rows=1)
        assert np.isnan(answer.outputs["y"]).all()


async def test_the_tap_sees_the_share_it_asked_for() -> None:
    int8, fp32 = ArithmeticExecutor("int8"), ArithmeticExecutor("fp32")
    seen: list[tuple[Any, Any, str]] = []
    async with serving(int8, fp32) as scheduler:
        scheduler.set_tap(lambda inputs, outputs, precision: seen.append((inputs, outputs, precision)), 0.25)
        for i in range(10):
            await asyncio.gather(*(scheduler.predict(x(1, i), rows=1) for _ in range(8)))
        assert len(seen) == 20
        for inputs, outputs, precision in seen:
            assert precision == "int8"
            np.testing.assert_array_equal(outputs["y"], 2 * inputs["x"])
        scheduler.set_tap(None)
        await scheduler.predict(x(), rows=1)
        assert len(seen) == 20


async def test_the_tap_sees_every_variant_and_something_in_quiet_times() -> None:
    int8, fp32 = ArithmeticExecutor("int8"), ArithmeticExecutor("fp32")
    seen: list[str] = []
    async with serving(int8, fp32) as scheduler:
        scheduler.set_tap(lambda inputs, outputs, precision: seen.append(precision), 0.0, quiet_s=0.0)
        await scheduler.predict(x(), rows=1, precision="fp32")
        await scheduler.predict(x(), rows=1)
        assert seen == ["fp32", "int8"]


@pytest.mark.parametrize("inline", [True, False])
async def test_a_variant_is_installed_under_traffic(inline: bool) -> None:
    old, new = ArithmeticExecutor("fp32"), ArithmeticExecutor("fp32")
    int8 = ArithmeticExecutor("int8")
    async with serving(old, slots=2, inline=inline) as scheduler:
        stop = False

        async def client() -> int:
            count = 0
            while not stop:
                answer = await scheduler.predict(x(), rows=1)
                np.testing.assert_array_equal(answer.outputs["y"], 2 * x()["x"])
                count += 1
            return count

        clients = [asyncio.create_task(client()) for _ in range(4)]
        await scheduler.install(int8)
        scheduler.set_precision("int8")
        await scheduler.install(new)
        assert old.open_slots == 0
        assert (await scheduler.predict(x(), rows=1)).precision == "int8"
        assert (await scheduler.predict(x(), rows=1, precision="fp32")).precision == "fp32"
        stop = True
        assert min(await asyncio.gather(*clients)) > 0
    assert (new.open_slots, int8.open_slots) == (0, 0)


async def test_a_variant_that_cannot_be_installed_leaves_everything_as_it_was() -> None:
    async with serving(ArithmeticExecutor(), slots=2) as scheduler:
        broken = ArithmeticExecutor("int8", fail_to_open=1)
        with pytest.raises(EngineError, match="cannot be opened"):
            await scheduler.install(broken)
        await until(lambda: broken.open_slots == 0)
        await scheduler.predict(x(), rows=1)


async def test_a_worker_that_is_born_during_an_installation_has_the_new_variant() -> None:
    old, new = ArithmeticExecutor("fp32"), ArithmeticExecutor("fp32")
    old.fault = fails_on(666, lambda: SystemExit(1))
    async with serving(old, slots=3) as scheduler:
        deadly = asyncio.create_task(scheduler.predict(x(1, 666), rows=1))
        await until(lambda: bool(old.ran))  # the replacement's warm-up runs count, too
        await scheduler.install(new)
        with pytest.raises(EngineError):
            await deadly
        await until(lambda: scheduler.fault is None and new.open_slots >= 3 and old.open_slots == 0)
        new.begin()
        await asyncio.gather(*(scheduler.predict(x(8), rows=8) for _ in range(20)))
        assert len(new.ran) == 20
    assert new.open_slots == 0


# --- faults -------------------------------------------------------------------------------------------
def fails_on(value: float, error: Callable[[], BaseException]) -> Callable[[np.ndarray], None]:
    def fault(batch: np.ndarray) -> None:
        if (batch[:, 0] == value).any():
            raise error()

    return fault


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("error", [lambda: EngineError("bad row"), lambda: RuntimeError("bug")])
async def test_a_bad_request_fails_alone(inline: bool, error: Callable[[], BaseException]) -> None:
    executor = ArithmeticExecutor(fault=fails_on(666, error))
    async with serving(executor, inline=inline) as scheduler:
        tasks = [scheduler.predict(x(1, 666 if i == 3 else i), rows=1) for i in range(6)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[3], EngineError)
        assert sum(isinstance(result, Answer) for result in results) == 5
        assert scheduler.fault is None


@pytest.mark.parametrize("rows", [1, 40])
async def test_a_workers_death_fails_what_it_held_turns_readiness_red_and_is_mended(rows: int) -> None:
    executor = ArithmeticExecutor(fault=fails_on(666, lambda: SystemExit(1)))
    async with serving(executor, slots=2) as scheduler:
        faults: set[str | None] = set()
        deadly = x(rows, 666 - 2 * (rows // 2) * 1.0)
        doomed = asyncio.create_task(scheduler.predict(deadly, rows=rows))
        while not doomed.done():
            faults.add(scheduler.fault)
            await asyncio.sleep(0)
        faults.add(scheduler.fault)
        with pytest.raises(EngineError, match="died"):
            doomed.result()
        assert any(fault is not None for fault in faults)
        await until(lambda: scheduler.fault is None)
        answers = await asyncio.gather(*(scheduler.predict(x(), rows=1) for _ in range(4)))
        assert len(answers) == 4
        assert executor.open_slots == 2


async def test_a_lost_device_fails_everything_and_stays_red() -> None:
    executor = ArithmeticExecutor(fault=fails_on(666, lambda: DeviceFailed("the GPU fell off the bus")))
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        tasks = [asyncio.create_task(scheduler.predict(x(1, value), rows=1)) for value in (666, 1, 2)]
        await until(lambda: len(executor.ran) == 1)
        executor.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineError) for result in results)
        assert "fell off the bus" in str(scheduler.fault)
        with pytest.raises(NotReady):
            await scheduler.predict(x(), rows=1)


async def test_an_engine_that_fails_even_a_probe_is_reported_until_it_works_again() -> None:
    broken = True

    def fault(batch: np.ndarray) -> None:
        if broken:
            raise EngineError("out of order")

    async with serving(ArithmeticExecutor(fault=fault)) as scheduler:
        for _ in range(4):
            with pytest.raises(EngineError):
                await scheduler.predict(x(), rows=1)
        await until(lambda: scheduler.fault is not None)
        assert "out of order" in str(scheduler.fault)
        broken = False
        await until(lambda: scheduler.fault is None)


async def test_bad_requests_alone_do_not_turn_readiness_red() -> None:
    executor = ArithmeticExecutor(fault=fails_on(666, lambda: EngineError("bad row")))
    async with serving(executor) as scheduler:
        for _ in range(10):
            with pytest.raises(EngineError):
                await scheduler.predict(x(1, 666), rows=1)
            assert scheduler.fault is None


async def test_no_slot_at_all_is_an_error_at_the_start() -> None:
    executor = ArithmeticExecutor(fail_to_open=100)
    layout = BatchLayout("dynamic", [1, 8], executor.inputs, executor.outputs, "batch")
    scheduler = Scheduler("m", layout, {"fp32": executor}, "fp32", Policy(), 2, ModelMetrics("m", "1"))
    with pytest.raises(EngineError, match="memory"):
        await scheduler.started()
    await scheduler.drain(1)


async def test_models_that_share_a_device_all_make_progress() -> None:
    device = Device(1)
    executors = [ArithmeticExecutor(fault=lambda batch: time.sleep(0.002)) for _ in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        schedulers = [
            await stack.enter_async_context(serving(executor, device=device, slots=2))
            for executor in executors
        ]
        ends = time.monotonic() + 0.3
        counts = [0, 0, 0]

        async def client(which: int) -> None:
            while time.monotonic() < ends:
                await schedulers[which].predict(x(8), rows=8)
                counts[which] += 1

        # One greedy model with eight clients, two with one each.
        await asyncio.gather(*(client(which) for which in [0] * 8 + [1, 2]))
        assert min(counts) > 0.4 * max(counts)


# --- drain --------------------------------------------------------------------------------------------
async def test_drain_refuses_the_new_and_finishes_the_admitted() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        tasks = [asyncio.create_task(scheduler.predict(x(), rows=1)) for _ in range(5)]
        await until(lambda: scheduler.inflight == 5)
        drain = asyncio.create_task(scheduler.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await scheduler.predict(x(), rows=1)
        executor.gate.set()
        assert all(isinstance(answer, Answer) for answer in await asyncio.gather(*tasks))
        await drain


async def test_drain_fails_what_is_left_when_its_time_is_over() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        tasks = [asyncio.create_task(scheduler.predict(x(), rows=1)) for _ in range(3)]
        await until(lambda: scheduler.inflight == 3)
        drain = asyncio.create_task(scheduler.drain(0.05))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, Draining) for result in results)
        executor.gate.set()
        await drain
