"""A request on its way through the scheduler, and its answer.

A protocol derives from PendingRequest and writes its response in `done`; there is no future and no
coroutine on the way, because both cost more than everything else that the scheduler does for a request.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Self

from vernier.border.batch import Answer
from vernier.errors import Cancelled, VernierError
from vernier.tensors import Arrays

if TYPE_CHECKING:
    from vernier.serving.padding import Gather, ShapeKey
    from vernier.serving.request_queue import Lane, Level

#: Where a request stands. Only QUEUED requests are in the queue's counts.
NEW, QUEUED, RUNNING, ENDED = range(4)


class PendingRequest(ABC):
    """A validated request. Everything below `deadline` belongs to the scheduler.

    Args:
        inputs: by name; the first axis is the batch unless the model has none. Not written to until done.
        rows: size of the batch axis; 1 for a model that has none.
        outputs: names of the wanted outputs; None for all.
        precision: a variant that must compute it; None for the active one.
        priority: larger goes first.
        deadline: on the scheduler's clock, in seconds; None for none.

    Attributes:
        count: how many callers wait for it: 1, but for a group, where it is those that are left.
        group: the one that it is in; None when it is a request of its own.
    """

    __slots__ = (
        "alone",
        "arrived",
        "attempt",
        "batch_size",
        "compute_s",
        "count",
        "deadline",
        "due",
        "gather",
        "group",
        "inputs",
        "lane",
        "level",
        "outputs",
        "precision",
        "priority",
        "promised",
        "rescue",
        "rows",
        "shape",
        "state",
        "taken",
        "unanswered",
    )

    def __init__(
        self,
        inputs: Arrays,
        rows: int,
        outputs: Sequence[str] | None = None,
        precision: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.outputs = outputs
        self.precision = precision
        self.priority = priority
        self.deadline = deadline
        self.count = 1
        self.group: RequestGroup | None = None
        self.state = NEW
        self.arrived = 0.0
        self.due = 0.0  # what the queue orders by: the deadline, or arrival plus patience
        self.promised: float | None = None  # by when, if that was predicted when it was admitted
        self.shape: ShapeKey = ()  # requests of one shape can share a batch
        self.lane: Lane | None = None
        self.level: Level | None = None  # where it waits; None when it does not
        self.taken = 0  # rows already handed to executions; between 0 and `rows` only for split requests
        self.unanswered = rows
        self.attempt = 0  # counts re-runs, so that what an earlier attempt computes is told apart
        self.alone = False  # its batch failed: run without company, so that the guilty one fails alone
        self.rescue: str | None = None  # the variant that must re-run it, after a non-finite output
        self.gather: Gather | None = None  # where the rows of a split request come together
        self.compute_s = 0.0
        self.batch_size = 0

    @abstractmethod
    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        """Called exactly once after a successful `submit`, on the event loop's thread, with either one.

        Not called for a request that its owner cancelled.
        """


class AwaitedRequest(PendingRequest):
    """A request whose end is awaited as `future`. Made where an event loop runs."""

    __slots__ = ("future",)

    def __init__(
        self,
        inputs: Arrays,
        rows: int,
        outputs: Sequence[str] | None = None,
        precision: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        super().__init__(inputs, rows, outputs, precision, priority, deadline)
        self.future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        if self.future.done():
            return  # its task was cancelled in the same turn of the loop
        if answer is not None:
            self.future.set_result(answer)
        else:
            self.future.set_exception(error or Cancelled("the request ended without an answer"))


class JoinedRequests(PendingRequest):
    """Requests that differ in their numbers and rows only, as one of all their rows; see `Scheduler.run_joined`.

    Args:
        each: rows of each.
    """

    __slots__ = ("each",)

    def __init__(
        self,
        inputs: Arrays,
        each: Sequence[int],
        outputs: Sequence[str] | None = None,
        precision: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        super().__init__(inputs, sum(each), outputs, precision, priority, deadline)
        self.each = each

    def rows_of(self, at: int) -> slice:
        """Where the rows of one of them lie."""
        start = sum(self.each[:at])
        return slice(start, start + self.each[at])

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        raise TypeError("joined requests are run at once and never submitted")


class RequestGroup(JoinedRequests):
    """Joined requests that wait and run as one for as long as all goes well.

    What befalls one of them alone (it is cancelled or late, its batch fails, its output is not finite) befalls it as
    a request of its own, so that it leaves the group or the group is dissolved before. Of a request in a group
    nothing is set but `group`, and `state`, which stays NEW.

    Args:
        requests: those that are joined.
        each: rows of each, not more than the largest batch.
        deadlines: of each; None for none. They should be nearly one: the group waits and is admitted as the first.

    Attributes:
        requests: None stands for one that has left. Empty once all have been told.
        promises: `promised` of each, once it is admitted.
    """

    __slots__ = ("deadlines", "promises", "requests")

    def __init__(
        self,
        requests: Sequence[PendingRequest],
        inputs: Arrays,
        each: Sequence[int],
        outputs: Sequence[str] | None = None,
        precision: str | None = None,
        priority: int = 0,
        deadlines: Sequence[float] | None = None,
    ) -> None:
        deadline = min(deadlines) if deadlines else None
        super().__init__(inputs, each, outputs, precision, priority, deadline)
        self.requests: list[PendingRequest | None] = list(requests)
        self.deadlines = deadlines
        self.promises: list[float | None] = [None] * len(requests)
        self.count = len(requests)
        for request in requests:
            request.group = self

    def keep(self, places: Sequence[int]) -> None:
        """Lets go of all but these; the others have not been admitted. Only while nobody has left."""
        kept, count = set(places), len(places)
        for at, request in enumerate(self.requests):
            if request is not None and at not in kept:
                request.group = None
        if count and places[-1] >= count:  # some between them go
            self._gather(places)
        self._become(0, count)
        if not count:
            self.inputs = {}  # no rows of an array still refer to all of it

    def _gather(self, places: Sequence[int]) -> None:
        """Puts these to the front, and forgets the others."""
        self.inputs = chosen(self.inputs, self.each, places)
        self.requests = [self.requests[at] for at in places]
        self.each = [self.each[at] for at in places]
        if self.deadlines is not None:
            self.deadlines = [self.deadlines[at] for at in places]

    def fitting(self, room: int) -> int:
        """How many from the front have not more than so many rows together. Only while nobody has left."""
        return bisect_right(list(accumulate(self.each)), room)

    def cut_off(self, count: int) -> Self:
        """So many from the front as a group of their own, which is about to run. Only while nobody has left."""
        front = copy(self)
        front._become(0, count)
        self._become(count, len(self.requests))
        for request in front.requests:
            if request is not None:
                request.group = front
        return front

    def _become(self, start: int, stop: int) -> None:
        first = sum(self.each[:start])
        last = first + sum(self.each[start:stop])
        self.inputs = {name: array[first:last] for name, array in self.inputs.items()}
        self.requests, self.each = self.requests[start:stop], self.each[start:stop]
        self.promises = self.promises[start:stop]
        self.count = stop - start
        self.rows = self.unanswered = last - first
        if self.deadlines is not None:
            self.deadlines = self.deadlines[start:stop]
            self.deadline = min(self.deadlines, default=None)

    def places(self) -> list[int]:
        """The numbers of those that are left."""
        return [at for at, request in enumerate(self.requests) if request is not None]

    def release(self, request: PendingRequest) -> None:
        """Makes one a request of its own, which stands where the group does."""
        self._release([self.requests.index(request)])

    def release_overdue(self, now: float) -> list[PendingRequest]:
        """Makes those whose deadline has come requests of their own."""
        times = self.deadlines
        return [] if times is None else self._release([at for at in self.places() if times[at] <= now])

    def dissolve(self) -> list[PendingRequest]:
        """Makes all that are left requests of their own. Not while they run."""
        requests = self._release(self.places())
        self.inputs = {}  # the queue may keep the group for a while
        return requests

    def _release(self, places: Sequence[int]) -> list[PendingRequest]:
        released = []
        state, deadlines = self.state, self.deadlines
        for at in places:
            request, rows, mine = self.requests[at], self.each[at], self.rows_of(at)
            assert request is not None
            inputs = {name: array[mine] for name, array in self.inputs.items()}
            deadline = None if deadlines is None else deadlines[at]
            PendingRequest.__init__(
                request, inputs, rows, self.outputs, self.precision, self.priority, deadline
            )
            request.state, request.arrived, request.promised = state, self.arrived, self.promises[at]
            request.due = self.due if deadline is None else deadline
            request.shape, request.lane, request.rescue = self.shape, self.lane, self.rescue
            self.requests[at] = self.promises[at] = None
            released.append(request)
        self.count -= len(places)
        if deadlines is not None:
            self.deadline = min([deadlines[at] for at in self.places()], default=None)
        if not self.count:
            self.state = ENDED
        return released

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        """Tells each; whoever can tell all at once overrides it."""
        requests, self.requests = self.requests, []  # they refer to each other
        arrays = repeat({}) if answer is None else cut(answer.outputs, self.each)
        faults = []
        for request, outputs in zip(requests, arrays, strict=False):
            if request is None:
                continue
            request.group = None
            try:
                request.done(answer and replace(answer, outputs=outputs), error)
            except Exception as fault:  # it must not cost the others their answers
                faults.append(fault)
        if faults:
            raise faults[0]


def cut(arrays: Arrays, rows: Sequence[int]) -> Iterator[Arrays]:
    """What each of several requests has of arrays in which their rows lie below each other. `rows`: of each."""
    start = 0
    for count in rows:
        yield {name: array[start : start + count] for name, array in arrays.items()}
        start += count


def chosen(arrays: Arrays, rows: Sequence[int], places: Sequence[int]) -> Arrays:
    """Copies of what some of several requests have of such arrays, below each other. `rows`: of each."""
    starts = list(accumulate(rows, initial=0))
    wanted = [row for at in places for row in range(starts[at], starts[at + 1])]
    return {name: array[wanted] for name, array in arrays.items()}


def start_again(request: PendingRequest) -> None:
    """Forgets what was computed so far; executions still under way no longer count."""
    request.attempt += 1
    request.taken = 0
    request.unanswered = request.rows
    request.gather = None
    request.compute_s = 0.0
    request.batch_size = 0
