"""A request on its way through the scheduler, and its answer.

A protocol derives from PendingRequest and writes its response in `done`; there is no future and no
coroutine on the way, because both cost more than everything else that the scheduler does for a request.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from app.errors import Cancelled, VernierError
from app.tensors import Arrays

if TYPE_CHECKING:
    from app.serving.padding import Gather, ShapeKey
    from app.serving.queue import Lane, Level

#: Where a request stands. Only QUEUED requests are in the queue's counts.
NEW, QUEUED, RUNNING, ENDED = range(4)


@dataclass(slots=True)
class Answer:
    """What the caller gets back.

    Attributes:
        outputs: the asked outputs by name, in the request's rows and order. They may be views of the batch's
            arrays: read them or copy them, do not write.
        precision: the variant that computed them.
        queue_s: seconds from admission to the dispatch that answered.
        compute_s: seconds of the execution that answered (the longest, when several did).
        batch_size: rows that were computed together (the most, when several executions did).
    """

    outputs: Arrays
    precision: str
    queue_s: float
    compute_s: float
    batch_size: int


class PendingRequest(ABC):
    """A validated request. Everything below `deadline` belongs to the scheduler.

    Args:
        inputs: by name; the first axis is the batch unless the model has none. Not written to until done.
        rows: size of the batch axis; 1 for a model that has none.
        outputs: names of the wanted outputs; None for all.
        precision: a variant that must compute it; None for the active one.
        priority: larger goes first.
        deadline: on the scheduler's clock, in seconds; None for none.
    """

    __slots__ = (
        "alone",
        "arrived",
        "attempt",
        "batch_size",
        "compute_s",
        "deadline",
        "due",
        "gather",
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

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        raise TypeError("joined requests are run at once and never submitted")


def cut(arrays: Arrays, rows: Sequence[int]) -> Iterator[Arrays]:
    """What each of several requests has of arrays in which their rows lie below each other. `rows`: of each."""
    for start, stop in pairwise(accumulate(rows, initial=0)):
        yield {name: array[start:stop] for name, array in arrays.items()}


def start_again(request: PendingRequest) -> None:
    """Forgets what was computed so far; executions still under way no longer count."""
    request.attempt += 1
    request.taken = 0
    request.unanswered = request.rows
    request.gather = None
    request.compute_s = 0.0
    request.batch_size = 0
