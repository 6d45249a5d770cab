"""The order of waiting requests; random orders are in tests/property/test_batching.py."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from vernier.serving.request import ENDED, QUEUED, RUNNING, Answer, PendingRequest, RequestGroup
from vernier.serving.request_queue import RequestQueue
from vernier.serving.simulate import group_of

LANE = ("fp32", (), False)


class Waiting(PendingRequest):
    def done(self, answer: Answer | None, error: Exception | None) -> None:
        """Nobody waits."""


def push(
    queue: RequestQueue, at: float, rows: int = 1, deadline: float | None = None, priority: int = 0
) -> Waiting:
    request = Waiting({"x": np.zeros(rows)}, rows, priority=priority, deadline=deadline)
    request.arrived = at
    request.due = at + 1.0 if deadline is None else deadline
    queue.push(request, LANE)
    return request


def order(queue: RequestQueue, now: float = 10.0) -> list[PendingRequest]:
    """Takes the requests one by one."""
    taken = []
    while queue.requests:
        (lane,) = queue.by_urgency(now)
        taken.append(queue.take(lane, 1, 100, now)[0][0])
    return taken


def test_without_deadlines_it_is_first_come_first_served() -> None:
    queue = RequestQueue(age_s=1.0)
    requests = [push(queue, 0.1 * i) for i in range(5)]
    assert order(queue) == requests


def push_group(queue: RequestQueue, at: float, count: int, rows: int = 1, priority: int = 0) -> RequestGroup:
    return push_mixed(queue, at, [rows] * count, priority)


def push_mixed(queue: RequestQueue, at: float, each: Sequence[int], priority: int = 0) -> RequestGroup:
    """A group of requests of so many rows each."""
    requests = [Waiting({"x": np.full(rows, i)}, rows, priority=priority) for i, rows in enumerate(each)]
    group = group_of(requests)
    group.arrived, group.due = at, at + 1.0
    queue.push(group, LANE)
    return group


def test_a_group_stands_in_one_place_and_counts_as_its_requests() -> None:
    queue = RequestQueue(age_s=1.0)
    first = push(queue, 0.5)
    before, after = push_group(queue, 0.2, 3, rows=2), push_group(queue, 0.8, 3, rows=2)
    assert (queue.requests, queue.rows, queue.rows_ahead(0)) == (7, 13, 13)
    (lane,) = queue.by_urgency(1.0)
    parts = queue.take(lane, 100, 100, 1.0)
    assert [(part[0], part[2]) for part in parts] == [(before, 6), (first, 1), (after, 6)]
    assert {part[0].state for part in parts} == {RUNNING}
    assert (queue.requests, queue.rows, queue.lanes) == (0, 0, {})


@pytest.mark.parametrize("priorities", [(0,), (0, 1)])
def test_of_a_group_as_many_run_as_there_is_room_for(priorities: tuple[int, ...]) -> None:
    queue = RequestQueue(age_s=1.0)
    for priority in priorities:
        push(queue, 0.0, priority=priority)
    group = push_group(queue, 0.1, 5, rows=2)
    requests = list(group.requests)
    (lane,) = queue.by_urgency(1.0)
    parts = queue.take(lane, 6, 100, 1.0)
    fit = (6 - len(priorities)) // 2
    front = parts[-1][0]
    assert isinstance(front, RequestGroup)
    assert front is not group
    assert (front.state, front.count, front.rows, parts[-1][1:3]) == (RUNNING, fit, 2 * fit, (0, 2 * fit))
    assert front.requests == requests[:fit]
    assert [request.group for request in front.requests if request] == [front] * fit
    assert front.inputs["x"].tolist() == [number for number in range(fit) for _ in range(2)]
    assert (group.state, group.count, group.requests) == (QUEUED, 5 - fit, requests[fit:])
    assert group.inputs["x"].tolist() == [number for number in range(fit, 5) for _ in range(2)]
    assert (queue.requests, queue.rows) == (5 - fit, 2 * (5 - fit))
    assert queue.take(lane, 100, 100, 1.0) == [(group, 0, group.rows, 0)]
    assert (queue.requests, queue.rows, queue.lanes) == (0, 0, {})


def test_of_a_group_whose_requests_are_larger_than_the_room_one_runs_where_nothing_else_does() -> None:
    queue = RequestQueue(age_s=1.0)
    push_group(queue, 0.0, 2, rows=4)
    (lane,) = queue.by_urgency(1.0)
    for left in (1, 0):
        ((front, start, rows, _),) = queue.take(lane, 2, 8, 1.0)
        assert (front.count, start, rows, queue.requests) == (1, 0, 4, left)
    push(queue, 0.0)
    push_group(queue, 0.1, 2, rows=4)
    (lane,) = queue.by_urgency(1.0)
    assert [part[2] for part in queue.take(lane, 3, 8, 1.0)] == [1]


@pytest.mark.parametrize("priorities", [(), (1,)])
def test_of_a_group_whose_requests_differ_in_rows_those_in_front_run_that_fit(
    priorities: tuple[int, ...],
) -> None:
    queue = RequestQueue(age_s=1.0)
    for priority in priorities:
        push(queue, 0.0, priority=priority)
    push_mixed(queue, 0.1, [1, 4, 2, 6, 1])
    (lane,) = queue.by_urgency(1.0)
    taken = []
    while queue.requests:
        parts = queue.take(lane, 7, 8, 1.0)
        taken.append([part[2] for part in parts if isinstance(part[0], RequestGroup)])
        for front, start, rows, _ in parts:
            assert (start, rows) == (0, front.rows)
            if isinstance(front, RequestGroup):
                own = [value for one in front.requests if one for value in one.inputs["x"].tolist()]
                assert front.inputs["x"].tolist() == own
    assert taken == ([[5], [2], [7]] if priorities else [[7], [7]])
    assert (queue.rows, queue.lanes) == (0, {})


def test_what_is_left_of_a_group_is_asked_about_when_its_first_deadline_comes() -> None:
    """Its place in the order does not change; a timer that is set for it must find it."""
    queue = RequestQueue(age_s=1.0)
    push(queue, 0.0, deadline=9.0)
    requests = [Waiting({"x": np.zeros(1)}, 1, deadline=at) for at in (2.0, 3.0)]
    group = group_of(requests)
    group.due = 2.0
    queue.push(group, LANE)  # before the first, so not in the line
    (lane,) = queue.by_urgency(1.0)
    (front,) = queue.take(lane, 1, 8, 1.0)
    assert front[0].deadline == 2.0
    assert (group.deadline, group.count) == (3.0, 1)
    at = queue.next_deadline()
    assert at is not None
    assert list(queue.overdue(at)) == [group]


def test_the_requests_of_a_dissolved_group_stand_where_it_stood() -> None:
    queue = RequestQueue(age_s=1.0)
    first, group, last = push(queue, 0.0), push_group(queue, 0.1, 3, rows=2), push(queue, 0.2)
    requests = list(group.requests)
    queue.dissolve(group)
    assert (queue.requests, queue.rows, group.state) == (5, 8, ENDED)
    assert [request.inputs["x"].tolist() for request in requests if request] == [[0, 0], [1, 1], [2, 2]]
    assert [request.group for request in requests if request] == [None] * 3
    assert order(queue) == [first, *requests, last]
    assert (queue.rows, queue.lanes) == (0, {})


def test_deadlines_and_patience_make_one_order() -> None:
    queue = RequestQueue(age_s=1.0)
    late, patient, soon, middle = (
        push(queue, 0.0, deadline=9.0),
        push(queue, 0.1),  # due at 1.1
        push(queue, 0.2, deadline=0.5),
        push(queue, 0.3, deadline=2.0),
    )
    assert order(queue) == [soon, patient, middle, late]


def test_a_step_of_priority_is_worth_the_age() -> None:
    queue = RequestQueue(age_s=1.0)
    old, fresh = push(queue, 0.0, priority=0), push(queue, 0.9, priority=1)
    assert order(queue) == [fresh, old]
    old, fresh = push(queue, 0.0, priority=0), push(queue, 1.1, priority=1)
    assert order(queue) == [old, fresh]


def test_a_batch_is_filled_until_the_next_does_not_fit_and_nobody_is_passed_over() -> None:
    queue = RequestQueue(age_s=1.0)
    requests = [push(queue, i, rows) for i, rows in enumerate([3, 4, 2, 1])]
    (lane,) = queue.by_urgency(5.0)
    assert [part[:3] for part in queue.take(lane, 8, 8, 5.0)] == [(requests[0], 0, 3), (requests[1], 0, 4)]
    assert [part[:3] for part in queue.take(lane, 8, 8, 5.0)] == [(requests[2], 0, 2), (requests[3], 0, 1)]
    assert queue.lanes == {}


def test_only_a_request_larger_than_any_batch_is_split_and_its_remainder_has_company() -> None:
    queue = RequestQueue(age_s=1.0)
    first, large, last = push(queue, 0.0, 5), push(queue, 1.0, 20), push(queue, 2.0, 1)
    batches = []
    while queue.requests:
        (lane,) = queue.by_urgency(5.0)
        batches.append([part[:3] for part in queue.take(lane, 8, 8, 5.0)])
    assert batches == [
        [(first, 0, 5), (large, 0, 3)],
        [(large, 3, 8)],
        [(large, 11, 8)],
        [(large, 19, 1), (last, 0, 1)],
    ]


def test_the_first_is_taken_whole_even_when_the_policy_wants_fewer_rows() -> None:
    queue = RequestQueue(age_s=1.0)
    request = push(queue, 0.0, 6)
    (lane,) = queue.by_urgency(0.0)
    assert [part[:3] for part in queue.take(lane, 2, 8, 0.0)] == [(request, 0, 6)]


def test_who_leaves_early_is_not_taken_and_not_counted() -> None:
    queue = RequestQueue(age_s=1.0)
    requests = [push(queue, i, 2, deadline=100.0 - i if i % 3 == 0 else None) for i in range(9)]
    for request in requests[::2]:
        queue.remove(request, ENDED)
    assert (queue.requests, queue.rows, queue.rows_ahead(0)) == (4, 8, 8)
    assert set(order(queue)) == set(requests[1::2])


def test_memory_stays_bounded_when_everybody_leaves_early() -> None:
    queue = RequestQueue(age_s=1.0)
    stays = push(queue, 0.0)
    for i in range(20_000):
        queue.remove(push(queue, 1.0 + i, deadline=None if i % 2 else 1e9 - i), ENDED)
    (level,) = next(iter(queue.lanes.values())).levels.values()
    assert level.entered < 1000
    assert order(queue) == [stays]


def test_a_request_that_comes_back_to_its_lane_is_taken_once() -> None:
    queue = RequestQueue(age_s=1.0)
    others = [push(queue, 0.5), push(queue, 0.6)]
    request = push(queue, 0.0)
    queue.remove(request, ENDED)
    queue.push(request, LANE)
    assert request.state == QUEUED
    assert order(queue) == [request, *others]


def test_overdue_finds_every_passed_deadline_and_the_next_one_is_known() -> None:
    random, queue = Random(1), RequestQueue(age_s=1.0)
    deadlines = [random.choice([None, random.random() * 10]) for _ in range(200)]
    requests = [push(queue, 0.001 * i, deadline=d, priority=i % 3) for i, d in enumerate(deadlines)]
    for now in (0.5, 3.0, 11.0):
        living = [r for r in requests if r.state == QUEUED and r.deadline is not None]
        assert queue.next_deadline() == min(r.deadline for r in living if r.deadline is not None)
        overdue = queue.overdue(now)
        assert set(overdue) == {r for r in living if r.deadline is not None and r.deadline <= now}
        assert len(overdue) == len(set(overdue))
        for request in overdue:
            queue.remove(request, ENDED)
    assert queue.next_deadline() is None
    assert queue.requests == deadlines.count(None)


def test_rows_ahead_counts_what_goes_first() -> None:
    queue = RequestQueue(age_s=1.0)
    assert queue.rows_ahead(0) == 0
    push(queue, 0.0, 4, priority=1)
    assert [queue.rows_ahead(p) for p in (0, 1, 2)] == [4, 4, 0]
    push(queue, 0.0, 3, priority=-1)
    assert [queue.rows_ahead(p) for p in (-2, -1, 0, 1, 2)] == [7, 7, 4, 4, 0]


def test_lanes_of_one_priority_go_by_due_time_and_priorities_come_before() -> None:
    queue = RequestQueue(age_s=100.0)
    lanes = [("fp32", (length,), False) for length in range(4)]
    for lane, (at, deadline, priority) in zip(
        lanes, [(0.0, 5.0, 0), (0.1, 3.0, 0), (0.2, 9.0, 1), (0.3, 4.0, 0)], strict=True
    ):
        request = Waiting({"x": np.zeros(1)}, 1, priority=priority, deadline=deadline)
        request.arrived, request.due = at, deadline
        queue.push(request, lane)
    assert [lane.key for lane in queue.by_urgency(0.5)] == [lanes[2], lanes[1], lanes[3], lanes[0]]
