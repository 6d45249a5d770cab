"""The order of waiting requests; random orders are in tests/property/test_batching.py."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from tests.support.scheduling import Sent
from vernier.border.batch import RequestBatch
from vernier.serving.queueing.request_queue import RequestQueue
from vernier.serving.queueing.span import BatchKey, BatchState, ExecutionPart, Span

KEY = ("fp32", (), False)
#: Rows of the largest execution; single requests of more rows are split.
LARGEST = 8


def a_queue(age_s: float = 1.0) -> RequestQueue:
    return RequestQueue(age_s, LARGEST)


def push(
    queue: RequestQueue,
    at: float,
    *each: int,
    deadlines: Sequence[float] | None = None,
    priority: int = 0,
    key: BatchKey = KEY,
) -> Span:
    """A batch of requests of so many rows each, or of one row."""
    batch = Sent(*each, priority=priority, deadlines=deadlines).batch
    batch.state = BatchState(batch.rows, at)
    span = Span(batch, 0, len(batch), at + 1.0, LARGEST)
    queue.push(span, key)
    return span


def order(queue: RequestQueue, now: float = 10.0) -> list[RequestBatch]:
    """Takes the requests one by one."""
    taken = []
    while queue.requests:
        (batch_queue,) = queue.by_urgency(now)
        taken += [part.batch for part in queue.take(batch_queue, 1, now)]
    return taken


def taken(parts: Sequence[ExecutionPart]) -> list[tuple[RequestBatch, int, int]]:
    for part in parts:
        assert part.span.key is None or part.span.taken
    return [(part.batch, part.start, part.rows) for part in parts]


def test_without_deadlines_it_is_first_come_first_served() -> None:
    queue = a_queue()
    batches = [push(queue, 0.1 * i).batch for i in range(5)]
    assert order(queue) == batches


def test_a_batch_stands_in_one_place_and_counts_as_its_requests() -> None:
    queue = a_queue()
    first, before, after = push(queue, 0.5), push(queue, 0.2, 2, 2, 2), push(queue, 0.8, 2, 2, 2)
    assert (queue.requests, queue.rows, queue.rows_ahead(0)) == (7, 13, 13)
    (batch_queue,) = queue.by_urgency(1.0)
    parts = queue.take(batch_queue, 100, 1.0)
    assert taken(parts) == [(before.batch, 0, 6), (first.batch, 0, 1), (after.batch, 0, 6)]
    assert (queue.requests, queue.rows, queue.batch_queues) == (0, 0, {})
    assert [part.batch.state.waiting for part in parts] == [[]] * 3


@pytest.mark.parametrize("priorities", [(0,), (0, 1)])
def test_of_a_batch_as_many_run_as_there_is_room_for(priorities: tuple[int, ...]) -> None:
    queue = a_queue()
    for priority in priorities:
        push(queue, 0.0, priority=priority)
    span = push(queue, 0.1, 2, 2, 2, 2, 2)
    (batch_queue,) = queue.by_urgency(1.0)
    parts = queue.take(batch_queue, 6, 1.0)
    fit = (6 - len(priorities)) // 2
    batch, front, start, rows = parts[-1]
    assert (batch, start, rows) == (span.batch, 0, 2 * fit)
    assert (front.start, front.stop, front.rows, front.key) == (0, fit, 2 * fit, None)
    assert (span.start, span.stop, span.first, span.rows) == (fit, 5, 2 * fit, 2 * (5 - fit))
    assert batch.state.waiting == [span]
    assert (queue.requests, queue.rows) == (5 - fit, 2 * (5 - fit))
    assert taken(queue.take(batch_queue, 100, 1.0)) == [(batch, 2 * fit, 10 - 2 * fit)]
    assert (queue.requests, queue.rows, queue.batch_queues) == (0, 0, {})


def test_of_requests_that_are_larger_than_the_room_one_runs_where_nothing_else_does() -> None:
    queue = a_queue()
    push(queue, 0.0, 4, 4)
    (batch_queue,) = queue.by_urgency(1.0)
    for start, left in ((0, 1), (4, 0)):
        (part,) = queue.take(batch_queue, 2, 1.0)
        assert (len(part.span), part.start, part.rows, queue.requests) == (1, start, 4, left)
    push(queue, 0.0)
    push(queue, 0.1, 4, 4)
    (batch_queue,) = queue.by_urgency(1.0)
    assert [part.rows for part in queue.take(batch_queue, 3, 1.0)] == [1]


@pytest.mark.parametrize("priorities", [(), (1,)])
def test_of_requests_that_differ_in_rows_those_in_front_run_that_fit(priorities: tuple[int, ...]) -> None:
    queue = a_queue()
    others = [push(queue, 0.0, priority=priority).batch for priority in priorities]
    push(queue, 0.1, 1, 4, 2, 6, 1)
    (batch_queue,) = queue.by_urgency(1.0)
    found = []
    while queue.requests:
        parts = queue.take(batch_queue, 7, 1.0)
        found.append([(part.start, part.rows) for part in parts if part.batch not in others])
    assert found == ([[(0, 5)], [(5, 2)], [(7, 7)]] if priorities else [[(0, 7)], [(7, 7)]])
    assert (queue.rows, queue.batch_queues) == (0, {})


def test_the_deadline_of_a_span_is_that_of_the_first_that_is_left() -> None:
    queue = a_queue()
    span = push(queue, 0.0, 1, 1, 1, deadlines=[3.0, 1.0, 2.0])
    assert (span.deadline, span.due, span.most_urgent()) == (1.0, 1.0, 1)
    span.narrow(2, 3)
    assert (span.deadline, span.due, span.most_urgent()) == (2.0, 1.0, 2)


def test_what_is_left_of_a_span_is_asked_about_when_its_first_deadline_comes() -> None:
    """Its place in the order does not change; a timer that is set for it must find it."""
    queue = a_queue()
    push(queue, 0.0, deadlines=[9.0])
    span = push(queue, 0.0, 1, 1, deadlines=[2.0, 3.0])  # before the first, so not in the line
    (batch_queue,) = queue.by_urgency(1.0)
    (front,) = queue.take(batch_queue, 1, 1.0)
    assert front.span.deadline == 2.0
    assert (span.deadline, len(span)) == (3.0, 1)
    at = queue.next_due()
    assert at is not None
    assert list(queue.overdue(at)) == [span]


@pytest.mark.parametrize("gone", range(4))
def test_of_a_span_one_request_leaves_and_the_others_stay_where_they_were(gone: int) -> None:
    queue = a_queue()
    first, span, last = push(queue, 0.0), push(queue, 0.1, 1, 2, 3, 4), push(queue, 0.2)
    batch = span.batch
    queue.withdraw(span, gone)
    assert (queue.requests, queue.rows) == (5, 12 - batch.rows[gone])
    assert sorted((s.start, s.stop) for s in batch.state.waiting) == [
        part for part in ((0, gone), (gone + 1, 4)) if part[0] < part[1]
    ]
    (batch_queue,) = queue.by_urgency(5.0)
    parts = queue.take(batch_queue, 100, 5.0)
    rows = [row for part in parts[1:-1] for row in range(part.start, part.start + part.rows)]
    starts = batch.state.starts
    assert rows == [row for row in range(10) if not starts[gone] <= row < starts[gone + 1]]
    assert (parts[0].batch, parts[-1].batch) == (first.batch, last.batch)
    assert (queue.requests, queue.rows, queue.batch_queues) == (0, 0, {})


def test_deadlines_and_patience_make_one_order() -> None:
    queue = a_queue()
    late, patient, soon, middle = (
        push(queue, 0.0, deadlines=[9.0]).batch,
        push(queue, 0.1).batch,  # due at 1.1
        push(queue, 0.2, deadlines=[0.5]).batch,
        push(queue, 0.3, deadlines=[2.0]).batch,
    )
    assert order(queue) == [soon, patient, middle, late]


def test_a_step_of_priority_is_worth_the_age() -> None:
    queue = a_queue()
    old, fresh = push(queue, 0.0, priority=0).batch, push(queue, 0.9, priority=1).batch
    assert order(queue) == [fresh, old]
    old, fresh = push(queue, 0.0, priority=0).batch, push(queue, 1.1, priority=1).batch
    assert order(queue) == [old, fresh]


def test_an_execution_is_filled_until_the_next_does_not_fit_and_none_is_passed_over() -> None:
    queue = a_queue()
    a, b, c, d = (push(queue, float(i), rows).batch for i, rows in enumerate([3, 4, 2, 1]))
    (batch_queue,) = queue.by_urgency(5.0)
    assert taken(queue.take(batch_queue, 8, 5.0)) == [(a, 0, 3), (b, 0, 4)]
    assert taken(queue.take(batch_queue, 8, 5.0)) == [(c, 0, 2), (d, 0, 1)]
    assert queue.batch_queues == {}


def test_only_a_request_larger_than_any_execution_is_split_and_its_remainder_has_company() -> None:
    queue = a_queue()
    first, large, last = push(queue, 0.0, 5).batch, push(queue, 1.0, 20).batch, push(queue, 2.0, 1).batch
    executions = []
    while queue.requests:
        (batch_queue,) = queue.by_urgency(5.0)
        executions.append(taken(queue.take(batch_queue, 8, 5.0)))
    assert executions == [
        [(first, 0, 5), (large, 0, 3)],
        [(large, 3, 8)],
        [(large, 11, 8)],
        [(large, 19, 1), (last, 0, 1)],
    ]


def test_the_first_is_taken_whole_even_when_the_policy_wants_fewer_rows() -> None:
    queue = a_queue()
    batch = push(queue, 0.0, 6).batch
    (batch_queue,) = queue.by_urgency(0.0)
    assert taken(queue.take(batch_queue, 2, 0.0)) == [(batch, 0, 6)]


def test_what_leaves_early_is_not_taken_and_not_counted() -> None:
    queue = a_queue()
    spans = [push(queue, i, 2, deadlines=[100.0 - i] if i % 3 == 0 else None) for i in range(9)]
    batches = [span.batch for span in spans]
    for span in spans[::2]:
        queue.remove(span)
    assert (queue.requests, queue.rows, queue.rows_ahead(0)) == (4, 8, 8)
    assert set(order(queue)) == set(batches[1::2])


def test_nothing_is_kept_of_what_leaves_early() -> None:
    queue = a_queue()
    stays = push(queue, 0.0).batch
    for i in range(2000):
        queue.remove(push(queue, 1.0 + i, deadlines=None if i % 2 else [1e9 - i]))
    assert [span.batch for span in queue] == [stays]
    assert order(queue) == [stays]


def test_overdue_finds_every_passed_deadline_and_the_next_one_is_known() -> None:
    random, queue = Random(1), a_queue()
    deadlines = [random.choice([None, random.random() * 10]) for _ in range(200)]
    spans = [
        push(queue, 0.001 * i, deadlines=None if d is None else [d], priority=i % 3)
        for i, d in enumerate(deadlines)
    ]
    for now in (0.5, 3.0, 11.0):
        living = [s for s in spans if s.key is not None and s.deadline is not None]
        assert queue.next_due() == min(s.deadline for s in living if s.deadline is not None)
        overdue = queue.overdue(now)
        assert set(overdue) == {s for s in living if s.deadline is not None and s.deadline <= now}
        assert len(overdue) == len(set(overdue))
        for span in overdue:
            queue.remove(span)
    assert queue.next_due() is None
    assert queue.requests == deadlines.count(None)


def test_rows_ahead_counts_what_goes_first() -> None:
    queue = a_queue()
    assert queue.rows_ahead(0) == 0
    push(queue, 0.0, 4, priority=1)
    assert [queue.rows_ahead(p) for p in (0, 1, 2)] == [4, 4, 0]
    push(queue, 0.0, 3, priority=-1)
    assert [queue.rows_ahead(p) for p in (-2, -1, 0, 1, 2)] == [7, 7, 4, 4, 0]


def test_batch_queues_of_one_priority_go_by_due_time_and_priorities_come_before() -> None:
    queue = a_queue(100.0)
    keys = [("fp32", (length,), False) for length in range(4)]
    for key, (at, deadline, priority) in zip(
        keys, [(0.0, 5.0, 0), (0.1, 3.0, 0), (0.2, 9.0, 1), (0.3, 4.0, 0)], strict=True
    ):
        push(queue, at, deadlines=[deadline], priority=priority, key=key)
    assert [found.key for found in queue.by_urgency(0.5)] == [keys[2], keys[1], keys[3], keys[0]]
