"""Who is let into the queue, in virtual time: alone or together, the decisions are the same."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from tests.support.schedules import make_batcher
from tests.support.scheduling import Sent
from vernier.border.batch import RequestBatch
from vernier.errors import QueueFull
from vernier.serving.queueing.admission import Policy
from vernier.serving.queueing.batcher import Batcher
from vernier.serving.queueing.span import BatchState

CURVE = {1: 0.006, 2: 0.007, 4: 0.008, 8: 0.010, 16: 0.015}


def a_batch(
    count: int, rows: int | Sequence[int] = 1, priority: int = 0, deadline: float | None = None
) -> RequestBatch:
    """rows: of all, or of each in turn."""
    each = [rows] if isinstance(rows, int) else rows
    deadlines = None if deadline is None else [deadline] * count
    return Sent(*[each[at % len(each)] for at in range(count)], priority=priority, deadlines=deadlines).batch


def admit(
    batcher: Batcher,
    batch: RequestBatch,
    now: float,
    free: tuple[float, ...],
) -> tuple[list[int], QueueFull | None]:
    """Who is admitted, and why the others are not."""
    batch.state = BatchState(batch.rows, now)
    refused = batcher.admit(batch, 0, len(batch), now, lambda: free)
    others = {number for numbers, _ in refused for number in numbers}
    assert len(others) == sum(len(numbers) for numbers, _ in refused)
    waiting = sorted(number for span in batch.state.waiting for number in range(span.start, span.stop))
    assert waiting == [number for number in range(len(batch)) if number not in others]
    return waiting, refused[0].error if refused else None


def one_by_one(
    batcher: Batcher, batches: list[RequestBatch], now: float, free: tuple[float, ...]
) -> tuple[list[int], QueueFull | None]:
    found = [admit(batcher, batch, now, free)[1] for batch in batches]
    refusals = [refusal for refusal in found if refusal is not None]
    assert (
        len({(r.message, r.retry_after_s) for r in refusals}) <= 1 or len({b.rows[0] for b in batches}) > 1
    ), "alike requests were refused differently"
    return [at for at, refusal in enumerate(found) if refusal is None], refusals[0] if refusals else None


def refusal_of_one(
    batcher: Batcher, kind: dict[str, Any], now: float, free: tuple[float, ...]
) -> QueueFull | None:
    return batcher.refusal(None, kind["priority"], kind["deadline"], now, lambda: free)


def promises(batch: RequestBatch) -> list[float | None]:
    return batch.state.promised or [None] * len(batch)


def told(refusal: QueueFull | None) -> tuple[str, float] | None:
    return None if refusal is None else (refusal.message, refusal.retry_after_s)


@pytest.mark.parametrize("seed", range(400))
def test_a_batch_is_decided_on_as_its_requests_would_be_one_by_one(seed: int) -> None:
    random = Random(seed)
    policy = Policy(
        objective_s=random.choice([None, 0.02, 0.06]), queue_limit=random.choice([1, 5, 30, 60, 1000])
    )
    together, alone = (make_batcher(16, policy=policy, curve=CURVE) for _ in range(2))
    now = 1.0
    outcomes = []
    for _ in range(8):
        now += random.choice([0.0, 0.001, 0.01])
        free = tuple(now + random.choice([-1.0, 0.002, 0.012]) for _ in range(random.choice([0, 1, 2, 3])))
        count = random.choice([1, 3, 20, 64])
        rows = random.choice([1, 1, 3, 16, [random.randint(1, 16) for _ in range(20)]])
        kind: dict[str, Any] = {
            "priority": random.choice([0, 0, 1]),
            "deadline": random.choice([None, None, now + 0.03, now + 0.1, now + 1.0]),
        }
        early, _ = [refusal_of_one(b, kind, now, free) for b in (together, alone)]
        batch = a_batch(count, rows, **kind)
        same = [a_batch(1, own, **kind) for own in batch.rows]
        admitted, refusal = admit(together, batch, now, free)
        expected, error = one_by_one(alone, same, now, free)
        assert (admitted, told(refusal)) == (expected, told(error))
        if rows == 1:
            assert told(early) == (None if admitted else told(refusal)), (
                "before it is read it is told the same"
            )
        assert promises(batch) == [promises(one)[0] for one in same]
        assert {span.due for span in batch.state.waiting} <= {
            span.due for one in same for span in one.state.waiting
        }
        assert together.queue.requests == alone.queue.requests
        assert together.queue.rows == alone.queue.rows
        assert together.rate.per_second(now) == alone.rate.per_second(now)
        outcomes.append((admitted, refusal))
        together.admission.margin.seconds = alone.admission.margin.seconds = random.choice([0.0, 0.005])
    assert any(admitted for admitted, _ in outcomes)


def test_what_waits_is_bounded_in_rows() -> None:
    batcher = make_batcher(16, policy=Policy(queue_limit=30), curve=CURVE)
    admitted, refusal = admit(batcher, a_batch(6, [10, 25, 10, 12, 10, 1]), 0.0, (1.0,))
    assert admitted == [0, 2, 4]
    assert refusal is not None
    assert (refusal.reason, refusal.message[:28]) == ("queue_full", "1 requests of 10 rows wait a")
    assert admit(batcher, a_batch(1), 0.0, (1.0,))[0] == []


def test_a_request_of_more_rows_than_may_wait_is_let_in_where_nothing_waits() -> None:
    batcher = make_batcher(16, policy=Policy(queue_limit=30), curve=CURVE)
    assert admit(batcher, a_batch(3, [100, 1, 100]), 0.0, (1.0,))[0] == [0]
    again = make_batcher(16, policy=Policy(queue_limit=30), curve=CURVE)
    assert admit(again, a_batch(3, [1, 100, 29]), 0.0, (1.0,))[0] == [0, 2]


def test_the_refusal_of_many_tells_the_wait_of_the_first_that_is_refused() -> None:
    batcher = make_batcher(16, policy=Policy(objective_s=0.06), curve=CURVE)
    admitted, refusal = admit(batcher, a_batch(200), 0.0, (0.010,))
    assert admitted == list(range(48))  # what runs, and three batches of 15 ms, end after 55 ms
    assert refusal is not None
    assert "61 ms" in refusal.message
    assert "60 ms allowed" in refusal.message
    # Who comes back comes with others: to a full batch, which ends after 70 ms.
    assert refusal.retry_after_s == pytest.approx(0.070 - 0.060 + 0.1 * 0.070)


@pytest.mark.parametrize("came", [0.05, 0.07])
def test_the_margin_learns_from_a_batch_as_from_its_requests(came: float) -> None:
    """The first of them starts at once, so nothing was predicted for it."""
    together, alone = (make_batcher(16, policy=Policy(objective_s=0.06), curve=CURVE) for _ in range(2))
    batch, same = a_batch(20), [a_batch(1) for _ in range(20)]
    admit(together, batch, 0.0, (0.0,))
    one_by_one(alone, same, 0.0, (0.0,))
    together.admission.margin.seconds = alone.admission.margin.seconds = 0.01
    for run in (range(5), range(6, 20)):  # nothing is learned from one that has left
        together.learn([(time, 0.0, count) for time, count in batch.state.promises(run)], came)
    for one in [*same[:5], *same[6:]]:
        alone.learn([(time, 0.0, count) for time, count in one.state.promises(range(1))], came)
    assert together.admission.margin.seconds == pytest.approx(alone.admission.margin.seconds, rel=1e-9)
    assert together.admission.margin.seconds != 0.01


def test_of_a_model_of_many_shapes_nothing_is_refused_before_it_is_read() -> None:
    flat, shaped = (
        make_batcher(4, policy=Policy(queue_limit=1), curve=CURVE, sequence=sequence)
        for sequence in (False, True)
    )
    admit(flat, a_batch(1), 0.0, (1.0,))
    assert flat.refusal(None, 0, None, 0.0, lambda: (1.0,)) is not None
    assert shaped.refusal(None, 0, None, 0.0, lambda: (1.0,)) is None
