"""Runs of requests of a batch, and what is known of each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduling import Sent
from vernier.serving.queueing.span import BatchState, Gather, Span, alike, runs

LARGEST = 8


def span_of(*rows: int) -> Span:
    batch = Sent(*rows).batch
    batch.state = BatchState(batch.rows, 1.0)
    return Span(batch, 0, len(rows), 2.0, LARGEST)


@given(st.sets(st.integers(0, 30)))
def test_runs_are_what_follows_each_other(numbers: set[int]) -> None:
    found = runs(sorted(numbers))
    assert [number for run in found for number in run] == sorted(numbers)
    assert all(a.stop < b.start for a, b in pairwise(found))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 60), st.integers(0, 11))
def test_as_many_fit_as_have_no_more_rows_together(each: list[int], room: int, start: int) -> None:
    span = span_of(*each)
    span.narrow(min(start, len(each) - 1), len(each))
    rows = each[span.start :]
    assert span.fitting(room) == max(n for n in range(len(rows) + 1) if sum(rows[:n]) <= room)
    assert (span.first, span.rows) == (sum(each[: span.start]), sum(rows))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=20), st.data())
def test_what_has_ended_is_told_from_what_has_not(each: list[int], data: st.DataObject) -> None:
    state = BatchState(each, 0.0)
    left = set(range(len(each)))
    for _ in range(3):
        gone = data.draw(st.sets(st.sampled_from(sorted(left)))) if left else set()
        for run in runs(sorted(gone)):
            state.end(run if data.draw(st.booleans()) else list(run))
        left -= gone
        assert state.left == len(left)
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(each))] * 2)))
        assert [at for run in state.living(start, stop) for at in run] == [
            at for at in range(start, stop) if at in left
        ]


def test_promises_are_told_by_those_that_share_one() -> None:
    state = BatchState([1] * 6, 0.0)
    assert list(state.promises(range(6))) == []
    state.promise(range(1, 5), [3.0, 3.0, None, 3.0])
    assert list(state.promises(range(6))) == [(3.0, 2), (3.0, 1)]
    assert list(state.promises(range(1, 3))) == [(3.0, 2)]
    assert list(state.promises(range(3, 4))) == []


@pytest.mark.parametrize(
    ("rows", "deadlines", "expected"),
    [
        ([1, 2, 8], None, [(0, 3)]),
        ([9, 1, 1, 9, 9, 1], None, [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]),
        ([1, 1, 1, 1], [11.0, 11.04, 11.01, 11.03], [(0, 4)]),
        ([1, 1, 1, 1], [11.0, 11.04, 12.0, 12.05], [(0, 2), (2, 4)]),
        ([1, 1, 1], [12.0, 11.0, 12.0], [(0, 1), (1, 2), (2, 3)]),
        ([1, 9, 1], [11.0, 11.0, 11.0], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_requests_share_a_span_when_their_deadlines_are_nearly_one_and_they_are_not_large(
    rows: list[int], deadlines: list[float] | None, expected: list[tuple[int, int]]
) -> None:
    batch = Sent(*rows, deadlines=deadlines).batch
    assert list(alike(batch, 0, len(rows), LARGEST, 10.0)) == expected


def test_only_a_request_that_is_larger_than_any_execution_is_gathered() -> None:
    assert span_of(9).gather is not None
    assert span_of(8).gather is None
    assert span_of(8, 8).gather is None


def test_the_rows_of_a_split_request_come_together_from_any_order() -> None:
    whole = np.arange(20.0, dtype=np.float32).reshape(10, 2)
    gather = Gather(10)
    last = False
    for start, end in ((7, 10), (0, 4), (4, 7)):
        assert not last
        gather.put(start, {"y": whole[start:end]})
        last = gather.add(end - start, 0.1 * start, end)
    assert last
    assert (gather.compute_s, gather.batch_size) == (pytest.approx(0.7), 10)
    np.testing.assert_array_equal(gather.arrays["y"], whole)
