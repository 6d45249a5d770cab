"""Batches that have been submitted to the engine process, or will be, and have not been released.

A batch travels in one part or, of many requests or after the death of an engine process, in several. However that is,
each of its requests ends once, and the batch is released once: when no part of it is under way any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

from vernier.border.batch import Answer, RequestBatch, chosen
from vernier.border.front_side.books import outcome_of
from vernier.border.front_side.remote_model import RemoteModel
from vernier.border.memory.answer_memory import AnswerMemory
from vernier.border.memory.placement import Placed
from vernier.border.records import wire
from vernier.border.signature import Signature
from vernier.errors import VernierError
from vernier.tensors import Array


class Carrier(Protocol):
    """What carries parts to an engine process."""

    def withdraw(self, part: Part, request: int, number: int) -> None:
        """Ends a request without telling.

        Args:
            request: by its number within the batch. number: within the part.
        """


class OpenBatch:
    """`RequestBatch.state` at a front.

    Attributes:
        model: the one that it was submitted to.
        ended: of each request: 1 when it has ended.
        left: requests that have not.
        parts: that are under way, or held.
    """

    __slots__ = ("batch", "ended", "left", "model", "parts")

    def __init__(self, model: RemoteModel, batch: RequestBatch) -> None:
        self.model = model
        self.batch = batch
        self.left = len(batch.rows)
        self.ended = bytearray(self.left)
        self.parts: list[Part] = []
        batch.state = self

    def end(self, requests: Sequence[int]) -> Sequence[int]:
        """Those of them that had not ended; they have now."""
        ended = self.ended
        if isinstance(requests, range) and requests.step == 1:
            start, stop = requests.start, requests.stop
            if ended.find(1, start, stop) < 0:
                ended[start:stop] = b"\1" * (stop - start)
                self.left -= stop - start
                return requests
        ending: list[int] = []
        for at in requests:
            if not ended[at]:
                ended[at] = 1
                ending.append(at)
        self.left -= len(ending)
        return ending

    def drop(self, part: Part) -> None:
        """The part is not under way any more; with the last one the batch is released."""
        self.parts.remove(part)
        if not self.parts:
            self.batch.state = None
            _tell(self.batch.target.released, self.batch)

    def cancel(self, request: int) -> None:
        """Ends a request without telling, unless it has ended."""
        if not self.ended[request]:
            part = next(part for part in self.parts if request in part.places)
            part.carrier.withdraw(part, request, part.places.index(request))


class Part:
    """Requests of a batch that travel together.

    Attributes:
        number: by which both sides know it.
        places: numbers of its requests within the batch, ascending.
        admitted: whether those that had not ended then have been counted as admitted.
        tries: engine processes that died while they ran it.
        placed: its inputs, for as long as the engine process may read them.
        rows: that were sent.
        carrier: that has sent it, or holds it.
    """

    __slots__ = ("admitted", "carrier", "number", "placed", "places", "rows", "tries", "whole")

    def __init__(self, carrier: Carrier, number: int, whole: OpenBatch, places: Sequence[int]) -> None:
        self.carrier = carrier
        self.number = number
        self.whole = whole
        self.places = places
        self.admitted = False
        self.tries = self.rows = 0
        self.placed: Placed | None = None
        whole.parts.append(self)

    def split(self, number: int, places: Sequence[int]) -> Part:
        """Some of its requests as a part of their own."""
        part = Part(self.carrier, number, self.whole, places)
        part.admitted, part.tries = self.admitted, self.tries
        return part

    def living(self) -> Sequence[int]:
        """Its requests that have not ended."""
        ended = self.whole.ended
        if self.whole.left == len(ended):
            return self.places
        return [at for at in self.places if not ended[at]]

    def living_rows(self) -> int:
        rows = self.whole.batch.rows
        return sum([rows[at] for at in self.living()])

    def inputs(self, signature: Signature) -> list[Array]:
        """Its rows, in the order of the model's inputs."""
        batch, places = self.whole.batch, self.places
        arrays = batch.inputs
        if len(places) != len(batch.rows):
            arrays = chosen(arrays, batch.rows, places)
        return [arrays[name] for name in signature.inputs]

    def record(self, model: RemoteModel, arrays: Sequence[Array], placed: Placed) -> bytes:
        """What is sent."""
        batch = self.whole.batch
        return wire.write_submission(
            self.number,
            model.number,
            self.column(batch.rows),
            self.column(batch.arrivals),
            None if batch.deadlines is None else self.column(batch.deadlines),
            batch.priority,
            batch.precision,
            model.output_numbers(batch.outputs),
            arrays,
            placed.places,
            self.tries > 0,
        )

    def column(self, column: Sequence[Any]) -> Sequence[Any]:
        """What a column of the batch holds of its requests."""
        places = self.places
        return column if len(places) == len(column) else [column[at] for at in places]

    def read_answer(self, memory: AnswerMemory, answered: wire.Answered, fds: Sequence[int]) -> Answer:
        """Raises WireError."""
        requests, batch = answered.requests, self.whole.batch
        if requests.stop > len(self.places):
            raise wire.WireError("an answer to more requests than a batch has")
        outputs = memory.read(batch.outputs, answered, fds)
        if self.whole.model.signature.has_batch:
            rows = sum(self.column(batch.rows)[requests.start : requests.stop])
            if any(array.ndim == 0 or len(array) != rows for array in outputs.values()):
                raise wire.WireError(f"an answer of other rows than the {rows} of its requests")
        return Answer(outputs, answered.precision, answered.queue_s, answered.compute_s, answered.batch_size)

    # --- ends -------------------------------------------------------------------------------------
    def answer(self, requests: range, answer: Answer) -> None:
        """Requests, by their numbers within the part, have this answer; those that have ended are not told."""
        whole, places = self.whole, self.places[requests.start : requests.stop]
        batch, books, ended = whole.batch, whole.model.books, whole.ended
        if isinstance(places, range) and ended.find(1, places.start, places.stop) < 0:
            count = places.stop - places.start
            ended[places.start : places.stop] = b"\1" * count
            whole.left -= count
            books.left(count, "answered", self.admitted)
            _tell(batch.target.answered, batch, places, answer)
            return
        alive = [at for at, place in enumerate(places) if not ended[place]]
        books.left(len(whole.end(places)), "answered", self.admitted)
        starts = list(accumulate([batch.rows[at] for at in places], initial=0))
        for run in _runs(alive, places):
            rows = slice(starts[run.start], starts[run.stop])
            outputs = answer.outputs
            if len(run) < len(places):
                outputs = {name: array[rows] for name, array in outputs.items()}
            own = Answer(outputs, answer.precision, answer.queue_s, answer.compute_s, answer.batch_size)
            first = places[run.start]
            _tell(batch.target.answered, batch, range(first, first + len(run)), own)

    def fail(self, requests: Sequence[int], error: VernierError, outcome: str | None) -> None:
        """Requests, by their numbers within the batch, end with this error unless they have ended."""
        whole = self.whole
        ending = whole.end(requests)
        if ending:
            whole.model.books.left(len(ending), outcome, self.admitted)
            _tell(whole.batch.target.failed, whole.batch, ending, error)

    def give_up(self, requests: Sequence[int], error: VernierError) -> None:
        """Ends requests, all that are left of a part which no engine process has."""
        outcome = outcome_of(error, self.admitted)
        if outcome is None and not self.admitted:
            self.whole.model.refused(error, len(requests))
        self.fail(requests, error, outcome)
        self.drop()

    def drop(self) -> None:
        self.whole.drop(self)


def _runs(numbers: Sequence[int], places: Sequence[int]) -> Iterator[range]:
    """Numbers, ascending, in runs that follow each other, as their places do."""
    start = previous = -2
    for at in numbers:
        if at != previous + 1 or places[at] != places[previous] + 1:
            if start >= 0:
                yield range(start, previous + 1)
            start = at
        previous = at
    if start >= 0:
        yield range(start, previous + 1)


def _tell(call: Callable[..., None], *arguments: Any) -> None:
    """A target's fault must not keep others from being told."""
    try:
        call(*arguments)
    except Exception as fault:
        context = {"message": "the end of a request could not be delivered", "exception": fault}
        asyncio.get_running_loop().call_exception_handler(context)
