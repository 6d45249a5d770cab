"""What crosses the border: requests that came together, and their answers.

A front collects the requests of one turn of its loop that differ only in their numbers, their rows and their times, and
submits them as one RequestBatch; a single request is a batch of one. The engine side ends every request exactly
once and tells the batch's target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from vernier.errors import VernierError
from vernier.tensors import Arrays


@dataclass(slots=True)
class Answer:
    """The answer to consecutive requests of a batch that were computed together.

    Attributes:
        outputs: the wanted outputs by name, the requests' rows below each other and in their order. They may be views
            of larger arrays: read them or copy them, do not write.
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


class ResponseTarget(Protocol):
    """Is told how the requests of a batch ended, on the loop's thread that submitted it."""

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        """These requests have their answer. May be called while `submit` still runs.

        Args:
            requests: their numbers within the batch; `answer.outputs` hold exactly their rows.
        """

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        """These requests were refused, failed or expired, all for the same reason."""

    def released(self, batch: RequestBatch) -> None:
        """Called once, when every request has ended and nothing reads the batch's inputs any more."""


class RequestBatch:
    """Requests for one model that came together and are alike. Not changed once it is made.

    Attributes:
        inputs: by name: the rows of all requests below each other, in C order; for a model without a batch axis, the
            arrays of the only request.
        rows: of each request; 1 for a model without a batch axis.
        outputs: names of the wanted outputs.
        precision: the variant that must compute them; None for the active one.
        priority: larger goes first.
        arrivals: when the first byte of each was seen, in seconds of CLOCK_MONOTONIC.
        deadlines: of each, on the same clock; None for none.
        target: who is told.
        tokens: the target's own, one for each request.
        state: the scheduler's own; None before the batch is submitted.
    """

    __slots__ = (
        "arrivals",
        "deadlines",
        "inputs",
        "outputs",
        "precision",
        "priority",
        "rows",
        "state",
        "target",
        "tokens",
    )

    def __init__(
        self,
        inputs: Arrays,
        rows: Sequence[int],
        outputs: Sequence[str],
        precision: str | None,
        priority: int,
        arrivals: Sequence[float],
        deadlines: Sequence[float] | None,
        target: ResponseTarget,
        tokens: Sequence[Any] = (),
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.outputs = outputs
        self.precision = precision
        self.priority = priority
        self.arrivals = arrivals
        self.deadlines = deadlines
        self.target = target
        self.tokens = tokens
        self.state: Any = None

    def __len__(self) -> int:
        """How many requests it holds."""
        return len(self.rows)


def cut(arrays: Arrays, rows: Sequence[int]) -> Iterator[Arrays]:
    """What each of several requests has of arrays in which their rows lie below each other.

    Args:
        rows: of each request.
    """
    start = 0
    for count in rows:
        yield {name: array[start : start + count] for name, array in arrays.items()}
        start += count


def chosen(arrays: Arrays, rows: Sequence[int], places: Sequence[int]) -> Arrays:
    """Copies of the rows that some of several requests have of such arrays, below each other.

    Args:
        rows: of each request.
        places: numbers of the requests.
    """
    starts = list(accumulate(rows, initial=0))
    wanted = [row for at in places for row in range(starts[at], starts[at + 1])]
    return {name: array[wanted] for name, array in arrays.items()}
