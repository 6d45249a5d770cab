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
from tests.support.scheduling import Sent, busy, serving, until, x, z_of
from vernier.border.batch import RequestBatch
from vernier.errors import DeadlineExceeded, DeviceFailed, Draining, EngineError, NotReady, QueueFull
from vernier.metrics import ModelMetrics
from vernier.serving.queueing.admission import Policy
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.queueing.sharing import DeviceScheduler
from vernier.serving.scheduling.scheduler import Answer, Scheduler

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


async def test_a_target_may_submit_the_next_batch_at_once() -> None:
    async with serving(ArithmeticExecutor(), inline=True) as scheduler:
        chain: list[Sent] = []

        class Link(Sent):
            def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
                super().answered(batch, requests, answer)
                if len(chain) < 100:
                    chain.append(Link())
                    scheduler.submit(chain[-1].batch)

        chain.append(Link())
        scheduler.submit(chain[0].batch)
        assert len(chain) < 100, "the loop was held up"
        await until(lambda: len(chain) == 100 and scheduler.inflight == 0)
        for link in chain:
            link.answer()
            assert link.releases == 1


async def test_a_fault_in_a_target_does_not_cost_the_others_their_answers() -> None:
    class Broken(Sent):
        def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
            super().answered(batch, requests, answer)
            raise ZeroDivisionError

        def released(self, batch: RequestBatch) -> None:
            super().released(batch)
            raise KeyError

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    async with serving(ArithmeticExecutor()) as scheduler:
        sent = [Sent(1, 1), Broken(1, 1), Sent(1, 1)]
        for one in sent:
            scheduler.submit(one.batch)
        await until(lambda: scheduler.inflight == 0)
        for one in sent:
            assert (one.kinds, one.releases) == ([Answer, Answer], 1)
        assert [type(context["exception"]) for context in reported] == [ZeroDivisionError, KeyError]


# --- admission, deadlines, cancellation --------------------------------------------------------------
async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, policy=Policy(queue_limit=3), largest=1) as scheduler:
        running = await busy(scheduler, executor)
        waiting = [Sent() for _ in range(3)]
        for one in waiting:
            scheduler.submit(one.batch)
        refused = Sent()
        scheduler.submit(refused.batch)
        refusal = refused.error()
        assert isinstance(refusal, QueueFull)
        assert refusal.retry_after_s > 0
        assert refused.releases == 1
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        for one in (running, *waiting):
            one.answer()


async def test_the_bound_on_what_waits_counts_rows() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, policy=Policy(queue_limit=6)) as scheduler:
        await busy(scheduler, executor)
        sent = [Sent(4), Sent(4), Sent(2), Sent(1)]
        for one in sent:
            scheduler.submit(one.batch)
        assert [one.kinds for one in sent] == [[None], [QueueFull], [None], [QueueFull]]
        assert (scheduler.queued, scheduler._queue.rows) == (2, 6)
        executor.gate.set()


async def test_a_request_of_more_rows_than_may_wait_is_admitted_where_nothing_waits() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, policy=Policy(queue_limit=6)) as scheduler:
        await busy(scheduler, executor)
        first, second = Sent(40), Sent(40)
        scheduler.submit(first.batch)
        scheduler.submit(second.batch)
        assert second.kinds == [QueueFull]
        executor.gate.set()
        await until(lambda: scheduler.inflight == 0)
        first.answer()


async def test_quick_requests_run_at_once_where_nothing_waits_and_each_is_counted() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, inline=True) as scheduler:
        sent = Sent(2, 2, 2, outputs=["y"])
        scheduler.submit(sent.batch)
        assert (sent.answers, sent.releases) == ([3], 1)
        for at in range(3):
            answer = sent.answer(at)
            assert (list(answer.outputs), answer.batch_size, answer.precision) == (["y"], 6, "fp32")
        totals = scheduler._metrics.totals()
        assert totals == {"admitted": 3, "answered": 3, "failed": 0, "expired": 0, "cancelled": 0}
        assert scheduler._metrics.serving("fp32", "onnxruntime").requests == 3
        assert scheduler._metrics.serving("fp32", "onnxruntime").queue.counts[0] == 3


async def test_more_than_one_execution_holds_runs_at_once_in_several() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, inline=True) as scheduler:
        sent = Sent(*[3] * 7)
        scheduler.submit(sent.batch)
        assert ([len(rows) for rows in executor.ran], sent.answers) == ([6, 6, 6, 3], [2, 2, 2, 1])
        for at in range(7):
            sent.answer(at)
        split = Sent(1, 20, 1)
        scheduler.submit(split.batch)
        assert (split.answers, scheduler.queued) == (
            [1],
            2,
        )  # what is run in several executions waits for the pump
        await until(lambda: scheduler.inflight == 0)
        assert split.kinds == [Answer] * 3


async def test_what_cannot_run_at_once_waits_its_turn() -> None:
    async with serving(ArithmeticExecutor(), inline=True) as scheduler:
        first = Sent(9)
        scheduler.submit(first.batch)  # more than an execution holds
        second = Sent(1, 1)
        scheduler.submit(second.batch)  # it would overtake
        assert scheduler.queued == 3
        await until(lambda: scheduler.inflight == 0)
        assert (first.kinds, second.kinds) == ([Answer], [Answer] * 2)


async def test_requests_that_fail_or_stray_when_they_run_at_once_are_run_again() -> None:
    def fault(batch: np.ndarray) -> None:
        if (batch[:, 0] == 100).any():
            raise EngineError("no")

    reduced = ArithmeticExecutor("int8", spoil=lambda batch: batch[:, 0] == 0, fault=fault)
    async with serving(reduced, ArithmeticExecutor(), inline=True) as scheduler:
        sent = Sent(1, 1)  # the second fails
        scheduler.submit(sent.batch)
        assert (sent.kinds, scheduler.queued) == ([None, None], 2)
        await until(lambda: scheduler.inflight == 0)
        assert sent.answer(0).precision == "fp32"
        assert isinstance(sent.error(1), EngineError)
        assert sent.releases == 1
        stray = Sent(1, 1, 1, start=-100.0)
        scheduler.submit(stray.batch)
        await until(lambda: scheduler.inflight == 0)
        assert [stray.answer(at).precision for at in (0, 1)] == ["int8", "fp32"]
        assert stray.kinds[2] is EngineError


async def test_a_deadline_ends_waiting_and_running_requests_at_that_moment() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        now = asyncio.get_running_loop().time()
        running = Sent(deadlines=[now + 0.05])
        scheduler.submit(running.batch)
        await until(lambda: len(executor.ran) == 1)
        waiting = Sent(deadlines=[now + 0.06])
        scheduler.submit(waiting.batch)
        await until(lambda: scheduler.inflight == 0, timeout_s=1.0)
        assert running.kinds == waiting.kinds == [DeadlineExceeded]
        assert (running.releases, waiting.releases) == (0, 1), "an execution still reads"
        executor.gate.set()
        await scheduler.predict(x(), rows=1)
        assert running.releases == 1
        assert len(executor.ran) == 2, "the expired request was executed"


async def test_a_deadline_shorter_than_the_loops_timers_ends_a_running_request() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        sent = Sent(deadlines=[asyncio.get_running_loop().time() + 0.0005])
        scheduler.submit(sent.batch)
        await until(lambda: scheduler.inflight == 0, timeout_s=1.0)
        assert sent.kinds == [DeadlineExceeded]


@pytest.mark.parametrize("inline", [True, False])
async def test_what_is_late_when_it_comes_is_not_admitted(inline: bool) -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, inline=inline) as scheduler:
        now = asyncio.get_running_loop().time()
        sent = Sent(1, 1, 1, 1, deadlines=[now + 30, now - 1, now + 30, now - 1])
        scheduler.submit(sent.batch)
        assert [sent.kinds[at] for at in (1, 3)] == [DeadlineExceeded] * 2
        await until(lambda: scheduler.inflight == 0)
        assert [sent.kinds[at] for at in (0, 2)] == [Answer] * 2
        assert scheduler._metrics.totals()["admitted"] == 2
        assert scheduler._metrics._rejected == {"deadline_exceeded": 2}
        assert sent.releases == 1


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


async def test_cancel_before_and_after_the_end_and_twice_changes_nothing() -> None:
    async with serving(ArithmeticExecutor()) as scheduler:
        sent = Sent()
        scheduler.cancel(sent.batch, 0)
        scheduler.submit(sent.batch)
        await until(lambda: sent.releases == 1)
        scheduler.cancel(sent.batch, 0)
        sent.answer()
        other = Sent()
        scheduler.submit(other.batch)
        scheduler.cancel(other.batch, 0)
        scheduler.cancel(other.batch, 0)
        assert (other.kinds, other.releases) == ([None], 1)
        await until(lambda: scheduler.inflight == 0)
        assert (other.kinds, other.releases) == ([None], 1)


async def test_higher_priority_goes_first() -> None:
    executor = ArithmeticExecutor()
    async with serving(executor, largest=1) as scheduler:
        executor.gate.clear()
        order: list[int] = []

        class Noted(Sent):
            def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
                order.append(batch.priority)

        scheduler.submit(Noted(priority=0).batch)
        await until(lambda: len(executor.ran) == 1)
        for priority in (1, -3, 5, 2):
            scheduler.submit(Noted(priority=priority).batch)
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
    device = DeviceScheduler(1)
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
