"""Who is let into the queue, in virtual time: alone or together, the decisions are the same."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.support.schedules import make_batcher
from vernier.errors import QueueFull
from vernier.serving.admission import Policy
from vernier.serving.batcher import Batcher
from vernier.serving.request import RUNNING, RequestGroup
from vernier.serving.simulate import Arrival, SimulatedRequest, group_of

CURVE = {1: 0.006, 2: 0.007, 4: 0.008, 8: 0.010, 16: 0.015}


def requests(
    count: int, rows: int | Sequence[int] = 1, priority: int = 0, timeout_s: float | None = None
) -> list[SimulatedRequest]:
    """rows: of all, or of each in turn."""
    each = [rows] if isinstance(rows, int) else rows
    return [
        SimulatedRequest(Arrival(0.0, own, priority, timeout_s), {"x": np.zeros(own, np.float32)})
        for own in (each[at % len(each)] for at in range(count))
    ]


def one_by_one(
    batcher: Batcher, asked: list[SimulatedRequest], now: float, free: tuple[float, ...]
) -> tuple[list[int], QueueFull | None]:
    found = [batcher.admit(request, now, lambda: free) for request in asked]
    refusals = [refusal for refusal in found if refusal is not None]
    assert len({(r.message, r.retry_after_s) for r in refusals}) <= 1 or len({r.rows for r in asked}) > 1, (
        "alike requests were refused differently"
    )
    return [at for at, refusal in enumerate(found) if refusal is None], refusals[0] if refusals else None


def as_a_group(
    batcher: Batcher,
    asked: list[SimulatedRequest],
    now: float,
    free: tuple[float, ...],
    earliest: float | None = None,
) -> tuple[list[int], QueueFull | None]:
    group = group_of(asked)
    refusal = batcher.admit(group, now, lambda: free, earliest)
    admitted = [at for at, request in enumerate(asked) if request.group is group]
    assert group.requests == [asked[at] for at in admitted]
    return admitted, refusal


def refusal_of_one(
    batcher: Batcher, kind: dict[str, Any], now: float, free: tuple[float, ...]
) -> QueueFull | None:
    return batcher.refusal(None, kind["priority"], kind["timeout_s"], now, lambda: free)


def told(refusal: QueueFull | None) -> tuple[str, float] | None:
    return None if refusal is None else (refusal.message, refusal.retry_after_s)


@pytest.mark.parametrize("seed", range(200))
def test_a_group_is_decided_on_as_its_requests_would_be_one_by_one(seed: int) -> None:
    random = Random(seed)
    policy = Policy(objective_s=random.choice([None, 0.02, 0.06]), queue_limit=random.choice([5, 30, 1000]))
    together, alone = (make_batcher(16, policy=policy, curve=CURVE) for _ in range(2))
    now = 1.0
    outcomes = []
    for _ in range(8):
        now += random.choice([0.0, 0.001, 0.01])
        free = tuple(now + random.choice([-1.0, 0.002, 0.012]) for _ in range(random.choice([0, 1, 2])))
        kind: dict[str, Any] = {
            "count": random.choice([1, 3, 20, 64]),
            "rows": random.choice([1, 1, 3, 16, [random.randint(1, 16) for _ in range(20)]]),
            "priority": random.choice([0, 0, 1]),
            "timeout_s": random.choice([None, None, now + 0.03, now + 1.0]),
        }
        early = refusal_of_one(together, kind, now, free)
        refusal_of_one(alone, kind, now, free)
        asked, same = requests(**kind), requests(**kind)
        admitted, refusal = as_a_group(together, asked, now, free)
        expected, error = one_by_one(alone, same, now, free)
        assert (admitted, told(refusal)) == (expected, told(error))
        if kind["rows"] == 1:
            assert told(early) == (None if admitted else told(refusal)), (
                "before it is read it is told the same"
            )
        if admitted:
            group = asked[admitted[0]].group
            assert group is not None
            assert [(at, group.due) for at in group.promises] == [
                (same[at].promised, same[at].due) for at in admitted
            ]
        assert together.queue.requests == alone.queue.requests
        assert together.queue.rows == alone.queue.rows
        assert together.rate.per_second(now) == alone.rate.per_second(now)
        outcomes.append((admitted, refusal))
        together.admission.margin.seconds = alone.admission.margin.seconds = random.choice([0.0, 0.005])
    assert any(admitted for admitted, _ in outcomes)


def test_the_refusal_of_many_tells_the_wait_of_the_first_that_is_refused() -> None:
    batcher = make_batcher(16, policy=Policy(objective_s=0.06), curve=CURVE)
    admitted, refusal = as_a_group(batcher, requests(200), 0.0, (0.010,))
    assert admitted == list(range(48))  # what runs, and three batches of 15 ms, end after 55 ms
    assert refusal is not None
    assert "61 ms" in refusal.message
    assert "60 ms allowed" in refusal.message
    # Who comes back comes with others: to a full batch, which ends after 70 ms.
    assert refusal.retry_after_s == pytest.approx(0.070 - 0.060 + 0.1 * 0.070)


@pytest.mark.parametrize("came", [0.05, 0.07])
def test_the_margin_learns_from_a_group_as_from_its_requests(came: float) -> None:
    """The first of them starts at once, so nothing was predicted for it."""
    together, alone = (make_batcher(16, policy=Policy(objective_s=0.06), curve=CURVE) for _ in range(2))
    same, asked = requests(20), requests(20)
    as_a_group(together, asked, 0.0, (0.0,))
    one_by_one(alone, same, 0.0, (0.0,))
    together.admission.margin.seconds = alone.admission.margin.seconds = 0.01
    (group,) = together.queue
    assert isinstance(group, RequestGroup)
    group.state = RUNNING
    group.release(asked[5])  # nothing is learned from one that has left
    together.answered(group, came)
    for request in [*same[:5], *same[6:]]:
        alone.answered(request, came)
    assert together.admission.margin.seconds == alone.admission.margin.seconds != 0.01


def test_the_objective_counts_from_when_the_requests_may_have_arrived() -> None:
    batcher = make_batcher(16, policy=Policy(objective_s=0.06), curve=CURVE)
    admitted, refusal = as_a_group(batcher, requests(200), 1.0, (1.010,), earliest=0.992)
    assert admitted == list(range(43))  # two full batches, and 11.9 ms for eleven more
    assert refusal is not None
    assert "52 ms allowed" in refusal.message


def test_of_a_model_of_many_shapes_nothing_is_refused_before_it_is_read() -> None:
    batcher = make_batcher(4, policy=Policy(queue_limit=0), curve=CURVE, sequence=True)
    assert batcher.refusal(None, 0, None, 0.0, lambda: (1.0,)) is None
    flat = make_batcher(4, policy=Policy(queue_limit=0), curve=CURVE)
    assert flat.refusal(None, 0, None, 0.0, lambda: (1.0,)) is not None
