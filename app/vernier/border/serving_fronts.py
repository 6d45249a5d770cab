"""The engine process's side of the border: batches of every front go to the schedulers, answers go back.

A catalogue says what is served. A model version leaves in two steps: fronts are told that it is gone, and once each has
acknowledged, nothing can be on its way to it any more and it is drained.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any

from vernier.border import wire
from vernier.border.arena import Arena, ArenaReader
from vernier.border.batch import Answer, RequestBatch
from vernier.border.catalogue import ServedModel
from vernier.border.channel import Channel
from vernier.border.messages import write_message
from vernier.border.placement import PlacedReader, place
from vernier.border.room import RoomPage
from vernier.border.running import RunningBatches
from vernier.errors import EngineError, NotReady, VernierError
from vernier.tensors import numpy_dtype

logger = logging.getLogger(__name__)

#: How long a front may take to acknowledge a catalogue before it is not waited for.
_ACKNOWLEDGE_S = 5.0

#: Answers a call of a front, `{"type": "load", …}`; raises VernierError.
Call = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class FrontSession:
    """One front. The target of its batches; belongs to the event loop's thread.

    Args:
        requests_fd: memory that the front writes. answers_fd: memory that this process writes.
        running_fd: see RunningBatches. They are closed here.
    """

    def __init__(
        self,
        fronts: Fronts,
        sock: socket.socket,
        requests_fd: int,
        answers_fd: int,
        running_fd: int,
    ) -> None:
        self._fronts = fronts
        self._requests = ArenaReader(requests_fd)
        self._arena = Arena(answers_fd, os.fstat(answers_fd).st_size)
        self._running = RunningBatches(running_fd)
        for fd in (requests_fd, answers_fd, running_fd):
            os.close(fd)
        self._batches: dict[int, tuple[ServedModel, RequestBatch]] = {}
        self._open: dict[int, int] = {}  # requests of each batch that have not ended
        self._unread: deque[list[Any]] = deque()  # memory of answers that the front has not acknowledged
        self._read = 0
        self.taken = 0  # the catalogue that the front has acknowledged
        self._channel = Channel(sock, self._take, self._lost)

    # --- in ---------------------------------------------------------------------------------------
    def _take(self, record: memoryview, fds: list[int]) -> None:
        try:
            kind = wire.kind_of(record)
            if kind == wire.SUBMIT:
                self._submit(wire.read_submission(record), fds)
            elif kind == wire.CONSUMED:
                self._consumed(wire.read_consumed(record))
            elif kind == wire.CANCEL:
                self._cancel(*wire.read_cancel(record))
            elif kind == wire.JSON:
                self._told(wire.read_json(record))
            else:
                raise wire.WireError(f"a record of kind {kind}")
        finally:
            for fd in fds:
                os.close(fd)

    def _submit(self, submission: wire.Submission, fds: Sequence[int]) -> None:
        number = submission.number
        model = self._fronts.model(submission.model)
        if model is None:
            error = NotReady("the model was taken out of service while the request was on its way; try again")
            self._channel.write(wire.write_failed(number, range(len(submission.rows)), error))
            self._channel.write(wire.write_released(number))
            return
        try:
            batch = self._batch(model, submission, fds)
        except wire.WireError as fault:
            logger.error("a batch makes no sense", extra={"model": model.name, "error": str(fault)})
            failed = EngineError(f"the request could not be handed over: {fault}")
            self._channel.write(wire.write_failed(number, range(len(submission.rows)), failed))
            self._channel.write(wire.write_released(number))
            return
        self._batches[number] = model, batch
        self._open[number] = len(batch)
        model.scheduler.submit(batch)
        if self._open.get(number):
            self._channel.write(wire.write_admitted(number))

    def _batch(self, model: ServedModel, submission: wire.Submission, fds: Sequence[int]) -> RequestBatch:
        """Raises WireError."""
        signature, rows = model.signature, submission.rows
        arrays = wire.arrays_of(
            tuple(signature.inputs), submission.tensors, PlacedReader(self._requests, fds).read
        )
        every = sum(rows)
        for name, spec in signature.inputs.items():
            array = arrays[name]
            if array.dtype != numpy_dtype(spec.dtype):
                raise wire.WireError(f"input '{name}' has dtype {array.dtype}")
            if signature.has_batch and (array.ndim == 0 or len(array) != every):
                raise wire.WireError(f"input '{name}' has not {every} rows")
        names = tuple(signature.outputs)
        numbers, precisions = submission.outputs, model.precisions
        if numbers is not None and (not numbers or max(numbers) >= len(names)):
            raise wire.WireError("an unknown output")
        if submission.precision > len(precisions):
            raise wire.WireError("an unknown precision")
        return RequestBatch(
            arrays,
            rows,
            names if numbers is None else [names[at] for at in numbers],
            precisions[submission.precision - 1] if submission.precision else None,
            submission.priority,
            submission.arrivals,
            submission.deadlines,
            self,
            (submission.number,),
        )

    def _cancel(self, number: int, index: int) -> None:
        found = self._batches.get(number)
        if found is not None and index < len(found[1]):
            model, batch = found
            self._open[number] -= 1
            model.scheduler.cancel(batch, index)

    def _consumed(self, answers: int) -> None:
        while self._read < answers and self._unread:
            self._unread.popleft()
            self._read += 1

    def _told(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "taken":
            self.taken = int(message["generation"])
            self._fronts.acknowledged.set()
        elif kind in ("load", "unload"):
            self._fronts.start(self._answer_call(message))

    async def _answer_call(self, message: dict[str, Any]) -> None:
        result: dict[str, Any]
        try:
            result = await self._fronts.call(message)
        except VernierError as error:
            result = {"error": wire.error_fields(error)}
        except Exception as fault:
            logger.exception("an administrative call failed")
            result = {"error": wire.error_fields(EngineError(f"the call failed: {fault!r}"))}
        self.tell({"type": "result", "call": message["call"], **result})

    # --- out: the target of batches ---------------------------------------------------------------
    def started(self, batch: RequestBatch) -> None:
        """An execution of requests of this batch begins."""
        self._running.begin(batch.tokens[0])

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        if self._channel.closed:
            return
        number = batch.tokens[0]
        self._open[number] -= len(requests)
        model, _ = self._batches[number]
        placed = place(answer.outputs.values(), self._arena)
        self._unread.append(placed.kept)
        precision = 1 + model.precisions.index(answer.precision)
        self._channel.write(
            wire.write_answered(number, requests, answer, precision, placed.places), placed.fds
        )

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        number = batch.tokens[0]
        self._open[number] -= len(requests)
        self._channel.write(wire.write_failed(number, requests, error))

    def released(self, batch: RequestBatch) -> None:
        number = batch.tokens[0]
        self._running.end(number)
        self._batches.pop(number, None)
        self._open.pop(number, None)
        self._channel.write(wire.write_released(number))

    def tell(self, message: dict[str, Any]) -> None:
        """Sends what is rare, such as the catalogue."""
        write_message(self._channel, message)

    # --- end --------------------------------------------------------------------------------------
    def _lost(self) -> None:
        """The front has died: nobody waits for its requests."""
        self._fronts.leave(self)
        open_batches = list(self._batches.values())
        if open_batches:
            logger.warning("a front has gone", extra={"batches": len(open_batches)})
        for model, batch in open_batches:
            for index in range(len(batch)):
                model.scheduler.cancel(batch, index)

    def close(self) -> None:
        self._channel.close()


class _Watch:
    """Publishes what a scheduler does."""

    def __init__(self, page: RoomPage, number: int) -> None:
        self._page = page
        self._number = number

    def room(self, rows: int, retry_after_s: float) -> None:
        self._page.publish(self._number, rows, retry_after_s)

    def started(self, batch: RequestBatch) -> None:
        target = batch.target
        if isinstance(target, FrontSession):
            target.started(batch)


class Fronts:
    """All fronts of this engine process, and what they are told of its models.

    Args:
        entries: describes every served version, see `RemoteModel`, as pairs of model and entry without its number.
        reason: why the service is not ready; None when it is.
        awaited: name → versions that will be served once they are loaded.
        starting: whether models are loaded for the first time.
        room: where the room of queues is published.
        call: answers administrative calls.

    Attributes:
        acknowledged: set whenever a front has acknowledged a catalogue.
    """

    def __init__(
        self,
        entries: Callable[[], list[tuple[ServedModel, dict[str, Any]]]],
        reason: Callable[[], str | None],
        awaited: Callable[[], dict[str, list[int]]],
        starting: Callable[[], bool],
        room: RoomPage,
        call: Call,
    ) -> None:
        self._entries = entries
        self._reason = reason
        self._awaited = awaited
        self._starting = starting
        self._room = room
        self.call = call
        self.acknowledged = asyncio.Event()
        self._sessions: set[FrontSession] = set()
        self._numbers = count(1)
        self._number: dict[int, int] = {}  # by the identity of a model that is kept in `_models`
        self._models: dict[int, ServedModel] = {}
        self._retiring: set[int] = set()
        self._generation = 0
        self._told: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def join(self, session: FrontSession) -> None:
        self._sessions.add(session)
        self._refresh()
        session.tell(self._told)

    def leave(self, session: FrontSession) -> None:
        self._sessions.discard(session)
        self.acknowledged.set()

    def model(self, number: int) -> ServedModel | None:
        return self._models.get(number)

    def start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def publish(self) -> None:
        """Tells every front what has changed, if anything has."""
        if self._refresh():
            for session in list(self._sessions):
                session.tell(self._told)

    def _refresh(self) -> bool:
        models = []
        for model, entry in self._entries():
            number = self._number.get(id(model))
            if number is None:
                number = self._number[id(model)] = next(self._numbers)
                self._models[number] = model
                model.scheduler.watch(_Watch(self._room, number))
            models.append({"number": number, **entry})
        news = {
            "type": "catalogue",
            "models": models,
            "awaited": self._awaited(),
            "starting": self._starting(),
            "reason": self._reason(),
        }
        if news == {key: value for key, value in self._told.items() if key != "generation"}:
            return False
        self._generation += 1
        self._told = {**news, "generation": self._generation}
        return True

    async def retire(self, model: ServedModel) -> None:
        """Returns when no front sends anything to this model any more; it has left the entries before."""
        self.publish()
        generation = self._generation
        try:
            async with asyncio.timeout(_ACKNOWLEDGE_S):
                while any(session.taken < generation for session in self._sessions):
                    self.acknowledged.clear()
                    await self.acknowledged.wait()
        except TimeoutError:
            logger.warning("a front has not acknowledged the catalogue", extra={"model": model.name})
        number = self._number.pop(id(model), None)
        if number is not None:
            del self._models[number]

    def close(self) -> None:
        sessions, self._sessions = self._sessions, set()
        for session in sessions:
            session.close()
