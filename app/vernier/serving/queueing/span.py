"""Runs of requests of one batch, and what the scheduler knows of a batch's requests.

Whatever waits or runs is a Span: the requests [start, stop) of one RequestBatch, mostly all of them. Where requests
of a span must part (some fit into an execution and others do not, one is cancelled, some are late, a failed batch is
run again request by request, an output is not finite) the span is split.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np

from vernier.border.batch import RequestBatch
from vernier.tensors import Arrays

#: A request's padded size of every named dimension besides the batch; requests with equal keys can share a batch.
ShapeKey = tuple[int, ...]
#: What requests must have in common to share an execution: precision, shape, and whether each must run alone.
BatchKey = tuple[str, ShapeKey, bool]

#: Deadlines that differ by so little of the time that is left count as one where requests wait.
_NEARLY = 0.05


class BatchState:
    """What the scheduler knows of the requests of a batch, in columns; `RequestBatch.state`.

    Attributes:
        arrived: when the batch was submitted, in seconds on the scheduler's clock.
        starts: the first row of each request, and at last the number of all rows.
        ended: of each request: 1 when it has ended.
        left: requests that have not ended.
        readers: parts of executions that read the inputs now.
        promised: by when each request should be answered, as predicted at admission; None where nothing was
            predicted, and None in the place of the column where nothing was predicted for any.
        shape: requests of one shape can share an execution.
        waiting: the batch's spans in the queue.
    """

    __slots__ = ("arrived", "ended", "left", "promised", "readers", "shape", "starts", "waiting")

    def __init__(self, rows: Sequence[int], arrived: float) -> None:
        count = len(rows)
        self.arrived = arrived
        self.starts = _starts(rows)
        self.ended = bytearray(count)
        self.left = count
        self.readers = 0
        self.promised: list[float | None] | None = None
        self.shape: ShapeKey = ()
        self.waiting: list[Span] = []

    def living(self, start: int, stop: int) -> Sequence[range]:
        """The requests from `start` to before `stop` that have not ended, as runs."""
        ended = self.ended
        if ended.find(1, start, stop) < 0:
            return (range(start, stop),)
        return runs(at for at in range(start, stop) if not ended[at])

    def end(self, requests: Sequence[int]) -> None:
        """These requests, which had not ended, have ended now."""
        if isinstance(requests, range):
            self.ended[requests.start : requests.stop] = b"\1" * len(requests)
        else:
            for at in requests:
                self.ended[at] = 1
        self.left -= len(requests)

    def promise(self, requests: range, times: Sequence[float | None]) -> None:
        """Notes by when these requests should be answered."""
        if self.promised is None:
            self.promised = [None] * len(self.ended)
        self.promised[requests.start : requests.stop] = times

    def promises(self, requests: range) -> Iterator[tuple[float, int]]:
        """By when these requests should have been answered, each time with the number of requests that follow each
        other with it."""
        if self.promised is None:
            return
        times = self.promised[requests.start : requests.stop]
        if times.count(times[0]) == len(times):
            if times[0] is not None:
                yield times[0], len(times)
            return
        for time, same in groupby(times):
            if time is not None:
                yield time, len(list(same))


class Gather:
    """Where the executions of a request of more rows than the largest execution put their outputs.

    Attributes:
        arrays: the outputs, once `add` has returned True.
        abandoned: the request has ended, or is computed anew: what is computed for this one counts no more.
        compute_s, batch_size: of the longest and the largest of its executions.
    """

    def __init__(self, rows: int) -> None:
        self.arrays: Arrays = {}
        self.abandoned = False
        self.compute_s = 0.0
        self.batch_size = 0
        self._rows = rows
        self._missing = rows
        self._lock = threading.Lock()

    def put(self, start: int, outputs: Arrays) -> None:
        """Takes outputs of the request's rows from `start` on. Any thread may call it."""
        for name, part in outputs.items():
            with self._lock:
                whole = self.arrays.get(name)
                if whole is None:
                    whole = self.arrays[name] = np.empty((self._rows, *part.shape[1:]), part.dtype)
            whole[start : start + part.shape[0]] = part

    def add(self, rows: int, compute_s: float, batch_size: int) -> bool:
        """Books an execution that has put its `rows` rows; True when all rows are there."""
        self._missing -= rows
        self.compute_s = max(self.compute_s, compute_s)
        self.batch_size = max(self.batch_size, batch_size)
        return not self._missing


class Span:
    """Requests of one batch that wait or run together. Pushed into a queue once at most.

    Args:
        due: what the queue orders by when the requests have no deadlines; their first deadline when they have.
        largest: rows of the largest execution. A request of more rows must be alone in its span; it is run in several
            executions.

    Attributes:
        batch: whose requests.
        start, stop: the requests [start, stop) of the batch, none of which has ended while the span waits.
        first, rows: the rows [first, first + rows) of the batch's inputs.
        taken: of these rows, those that executions have got; other than 0 only for a request run in several.
        arrived: when the requests were submitted, in seconds on the scheduler's clock.
        deadline: the first of the requests' deadlines; None when they have none.
        alone: run each request in an execution of its own: the execution of several failed.
        retry: the variant that must compute the requests anew, after an output that was not finite.
        gather: where the outputs of a request that is run in several executions come together; None for all others.
        key: of the batch queue in which the span waits; None while it does not wait.
    """

    __slots__ = (
        "alone",
        "arrived",
        "batch",
        "deadline",
        "due",
        "first",
        "gather",
        "key",
        "priority",
        "retry",
        "rows",
        "start",
        "stop",
        "taken",
    )

    def __init__(self, batch: RequestBatch, start: int, stop: int, due: float, largest: int) -> None:
        self.batch = batch
        self.arrived: float = batch.state.arrived
        self.priority = batch.priority
        self.taken = 0
        self.alone = False
        self.retry: str | None = None
        self.key: BatchKey | None = None
        self.narrow(start, stop)
        self.due = due if self.deadline is None else self.deadline
        self.gather = Gather(self.rows) if self.rows > largest and stop - start == 1 else None

    def __len__(self) -> int:
        """How many requests."""
        return self.stop - self.start

    def narrow(self, start: int, stop: int) -> None:
        """Keeps these requests only; its place in the queue's order does not change."""
        batch = self.batch
        starts = batch.state.starts
        self.start = start
        self.stop = stop
        self.first: int = starts[start]
        self.rows: int = starts[stop] - starts[start]
        deadlines = batch.deadlines
        self.deadline = None if deadlines is None else min(deadlines[start:stop])

    def part(self, start: int, stop: int, largest: int) -> Span:
        """Some of the requests as a span of their own, which waits nowhere yet."""
        made = Span(self.batch, start, stop, self.due, largest)
        made.alone = self.alone
        made.retry = self.retry
        return made

    def fitting(self, room: int) -> int:
        """How many requests from the front have not more than `room` rows together."""
        starts: Sequence[int] = self.batch.state.starts
        return bisect_right(starts, self.first + room, self.start + 1, self.stop + 1) - 1 - self.start

    def most_urgent(self) -> int:
        """The request with the first deadline."""
        deadlines = self.batch.deadlines
        assert deadlines is not None
        assert self.deadline is not None
        return deadlines.index(self.deadline, self.start, self.stop)


class ExecutionPart(NamedTuple):
    """What one execution computes of a span: the rows [start, start + rows) of the batch's inputs."""

    batch: RequestBatch
    span: Span
    start: int
    rows: int


def runs(numbers: Iterable[int]) -> list[range]:
    """Ascending numbers as runs of those that follow each other."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def alike(batch: RequestBatch, start: int, stop: int, largest: int, now: float) -> Iterator[tuple[int, int]]:
    """The requests [start, stop) by those that can share a span: their deadlines are nearly one, and a request of more
    rows than the largest execution is alone."""
    rows, deadlines = batch.rows, batch.deadlines
    if max(rows[start:stop]) <= largest and (
        deadlines is None or _nearly_one(min(deadlines[start:stop]), max(deadlines[start:stop]), now)
    ):
        yield start, stop
        return
    first = start
    earliest = latest = 0.0
    for request in range(start, stop):
        due = 0.0 if deadlines is None else deadlines[request]
        if first < request and (
            rows[request] > largest
            or rows[first] > largest
            or (deadlines is not None and not _nearly_one(min(earliest, due), max(latest, due), now))
        ):
            yield first, request
            first = request
        earliest, latest = (due, due) if first == request else (min(earliest, due), max(latest, due))
    yield first, stop


def _nearly_one(earliest: float, latest: float, now: float) -> bool:
    return latest - earliest <= _NEARLY * (earliest - now)


def _starts(rows: Sequence[int]) -> Sequence[int]:
    """Where each request's rows begin, and where the last one's end."""
    count, first = len(rows), rows[0]
    if first and (count == 1 or rows.count(first) == count):
        return range(0, first * count + 1, first)
    return list(accumulate(rows, initial=0))
