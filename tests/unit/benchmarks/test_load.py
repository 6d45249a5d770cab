"""The load generator, against a small server on this machine that answers as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from benchmarks.load import (
    Burst,
    Call,
    ClosedLoop,
    FloatOutput,
    JsonOutput,
    OpenLoop,
    Record,
    measure,
    poisson,
    post,
    run,
    wrk,
)
from benchmarks.load.loops import loop_of
from benchmarks.load.plans import Plan

Answer = Callable[[bytes], Awaitable[bytes]]


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = "".join(f"{line}\r\n" for line in (f"Content-Length: {len(body)}", *headers))
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def serving(reply: Answer) -> AsyncIterator[int]:
    """A server's port; `reply` gets each body and gives the bytes to send, none to hang up."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if task := asyncio.current_task():
            tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                sent = await reply(await reader.readexactly(length))
                if not sent:
                    break
                writer.write(sent)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


async def echo(body: bytes) -> bytes:
    return answer(body)


CALLS = [Call(post("/", b"[%d]" % n), JsonOutput((), [n])) for n in range(3)]


# --- both loops -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [ClosedLoop, OpenLoop])
async def test_every_answer_is_checked_against_its_own_call(kind: type[Plan]) -> None:
    more: dict[str, Any] = {"rate": 400} if kind is OpenLoop else {}
    async with serving(echo) as port:
        record = await run(kind(port=port, calls=CALLS, seconds=0.3, connections=4, **more))
    summary = record.summary()
    assert summary.checked == summary.requests > 50
    assert summary.wrong == 0
    assert summary.statuses == {200: summary.requests}
    assert summary.goodput == summary.rate


async def test_a_wrong_answer_is_no_good() -> None:
    async def wrong_one(body: bytes) -> bytes:
        return answer(b"[7]" if body == b"[1]" else body)

    async with serving(wrong_one) as port:
        summary = (await run(ClosedLoop(port=port, calls=CALLS, seconds=0.2, connections=3))).summary()
    assert summary.wrong == pytest.approx(summary.requests / 3, abs=3)
    assert summary.goodput == pytest.approx(summary.rate * 2 / 3, rel=0.1)


async def test_refusals_are_counted_and_do_not_flatter_the_latency() -> None:
    turns = 0

    async def refuse_half(body: bytes) -> bytes:
        nonlocal turns
        turns += 1
        if turns % 2:
            return answer(b"full", "429 Too Many Requests")
        await asyncio.sleep(0.03)
        return answer(body)

    async with serving(refuse_half) as port:
        summary = (await run(ClosedLoop(port=port, calls=CALLS, seconds=0.3, connections=2))).summary()
    assert set(summary.statuses) == {200, 429}
    assert summary.p50_ms is not None
    assert summary.p50_ms >= 30
    assert summary.rate == pytest.approx(summary.statuses[200] / 0.3)


async def test_chunked_answers_and_closed_connections() -> None:
    async def chunked(body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n%x\r\n%s\r\n0\r\n\r\n" % (
            len(body) - 1,
            body[1:],
        )

    async def closing(body: bytes) -> bytes:
        return answer(body, "200 OK", "Connection: close")

    async with serving(chunked) as port:
        summary = (await run(ClosedLoop(port=port, calls=CALLS, seconds=0.1, connections=2))).summary()
        assert summary.checked == summary.requests > 10
        assert summary.wrong == 0
    async with serving(closing) as port:
        summary = (await run(ClosedLoop(port=port, calls=CALLS, seconds=0.3, connections=2))).summary()
        assert summary.requests > 4  # each connection came back
        assert not summary.errors


async def test_broken_connections_are_errors_and_are_opened_again() -> None:
    turns = 0

    async def hang_up_sometimes(body: bytes) -> bytes:
        nonlocal turns
        turns += 1
        return answer(body) if turns % 10 else b""

    async with serving(hang_up_sometimes) as port:
        record = await run(OpenLoop(port=port, calls=CALLS, seconds=0.5, rate=200, connections=8))
    summary = record.summary()
    assert summary.errors["disconnected"] == pytest.approx(turns / 10, abs=1)
    assert summary.statuses[200] + summary.errors["disconnected"] == summary.requests == turns


async def test_nobody_there() -> None:
    async with serving(echo) as port:
        pass
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} does not take 2 connections"):
        await run(ClosedLoop(port=port, calls=CALLS, seconds=0.1, connections=2))


async def test_no_plan_of_its_own() -> None:
    with pytest.raises(TypeError, match="neither an OpenLoop nor a ClosedLoop"):
        loop_of(Plan(port=1, calls=CALLS, seconds=1))
    with pytest.raises(ValueError, match="above 0"):
        ClosedLoop(port=1, calls=[], seconds=1)


# --- coordinated omission -------------------------------------------------------------------------
async def test_a_stall_is_in_the_latency_of_all_that_were_due_meanwhile() -> None:
    came = 0
    going_on = asyncio.Event()

    async def stall(body: bytes) -> bytes:
        nonlocal came
        came += 1
        if came == 60:
            asyncio.get_running_loop().call_later(0.4, going_on.set)
        if came >= 60:
            await going_on.wait()
        return answer(body)

    async with serving(stall) as port:
        plan = OpenLoop(port=port, calls=CALLS, seconds=1.0, rate=200, connections=4)
        record = await run(plan)
    due = poisson(200, 1.0)
    assert np.allclose(np.sort(record.due_s), due)  # each request that was due is there, once
    resumed = due[59] + 0.4
    stalled = due[(due >= due[59]) & (due < resumed - 0.1)]
    assert len(stalled) > 40  # ten times as many as there are connections
    slow = record.due_s[record.latency_s > 0.1]
    assert set(stalled) <= set(slow)
    for began, latency in zip(record.due_s, record.latency_s, strict=True):
        if due[59] <= began < resumed:
            assert began + latency >= resumed - 0.005
    assert record.summary().waited >= len(stalled) - 4


async def test_what_is_never_answered_counts_with_the_time_it_was_waited_for() -> None:
    async def silent(body: bytes) -> bytes:
        await asyncio.sleep(60)
        return b""

    async with serving(silent) as port:
        plan = OpenLoop(port=port, calls=CALLS, seconds=0.2, rate=100, connections=2, grace_s=0.2)
        record = await run(plan)
    summary = record.summary()
    assert summary.errors == {"unanswered": len(poisson(100, 0.2))}
    assert summary.rate == summary.goodput == 0
    assert np.all(record.due_s + record.latency_s >= 0.39)
    assert summary.p99_ms is not None
    assert summary.p99_ms > 300


# --- figures --------------------------------------------------------------------------------------
def record_of(latency_ms: list[float], status: list[int], *, is_open: bool = True) -> Record:
    n = len(latency_ms)
    return Record(
        due_s=np.linspace(0, 10, n, endpoint=False),
        latency_s=np.array(latency_ms) / 1e3,
        status=np.array(status, np.int16),
        right=np.full(n, -1, np.int8),
        lag_s=np.zeros(n),
        waited=np.zeros(n, np.bool_),
        window_s=(0, 10),
        is_open=is_open,
    )


def test_percentiles_rates_and_goodput() -> None:
    latency = [float(n) for n in range(1, 1001)]
    summary = record_of(latency, [200] * 1000).summary(objective_ms=250)
    assert summary.rate == 100
    assert summary.goodput == 25
    assert summary.p50_ms == pytest.approx(500.5)
    assert summary.p99_ms == pytest.approx(990.01)
    assert summary.p999_ms == pytest.approx(999.001)
    assert summary.max_ms == 1000


def test_the_window_follows_arrivals_in_an_open_loop_and_answers_in_a_closed_one() -> None:
    late = [6000.0] * 10
    assert len(record_of(late, [200] * 10).between(0, 5)) == 5
    assert len(record_of(late, [200] * 10, is_open=False).between(0, 5)) == 0
    assert record_of(late, [200] * 10).after(2).summary().seconds == 8


def test_no_answers_no_percentiles() -> None:
    summary = record_of([], []).summary()
    assert summary.p99_ms is None
    assert summary.requests == summary.rate == 0
    json.dumps(summary.as_dict())


def test_checks() -> None:
    json_check = JsonOutput(("outputs", "y"), [1, 2])
    assert json_check(b'{"outputs": {"y": [[1.00001], [2]]}}')
    for body in (
        b'{"outputs": {"y": [[1.1], [2]]}}',
        b'{"outputs": {"y": [1]}}',
        b"[]",
        b"}",
        b'{"outputs": {}}',
    ):
        assert not json_check(body)
    float_check = FloatOutput([1, 2])
    assert float_check(b"x" + np.array([1, 2], "<f4").tobytes())
    assert not float_check(b"x" + np.array([1, np.nan], "<f4").tobytes())
    assert not float_check(np.array([1], "<f4").tobytes())


def test_a_poisson_schedule() -> None:
    times = poisson(1000, 20, seed=3)
    assert np.array_equal(times, poisson(1000, 20, seed=3))
    gaps = np.diff(times)
    assert np.all(gaps >= 0)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # exponential
    bursty = poisson(1000, 20, bursts=[Burst(5, 2, 4.0)])
    assert np.sum((bursty >= 5) & (bursty < 7)) == pytest.approx(8000, rel=0.05)
    assert np.sum(bursty < 5) == pytest.approx(5000, rel=0.05)
    with pytest.raises(ValueError, match="above 0"):
        poisson(0, 1)


# --- drivers of their own -------------------------------------------------------------------------
async def test_in_a_process_of_its_own() -> None:
    async with serving(echo) as port:
        plan = ClosedLoop(port=port, calls=CALLS, seconds=0.2, connections=2)
        record = await asyncio.to_thread(measure, plan, 0)
    assert record.summary().checked > 10
    assert record.summary().wrong == 0


@pytest.mark.skipif(not wrk.is_installed(), reason="wrk is a system package")
async def test_wrk_sends_the_same_calls() -> None:
    seen = set()

    async def note(body: bytes) -> bytes:
        seen.add(body)
        return answer(body, "500 Internal Server Error" if body == b"[2]" else "200 OK")

    async with serving(note) as port:
        plan = ClosedLoop(port=port, calls=CALLS, seconds=1, connections=2)
        summary = await asyncio.to_thread(wrk.drive, plan)
    assert seen == {b"[0]", b"[1]", b"[2]"}
    assert summary.driver == "wrk"
    assert summary.statuses[400] == pytest.approx(summary.requests / 3, abs=2)
    assert summary.rate * summary.seconds == pytest.approx(summary.statuses[200])
    assert summary.p99_ms is not None
