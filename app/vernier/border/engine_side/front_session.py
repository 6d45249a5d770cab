"""One front, as the engine process sees it: its batches go to the schedulers, their answers go back."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

from vernier.border.batch import Answer, RequestBatch
from vernier.border.catalogue import ServedModel
from vernier.border.engine_side.last_tries import LastTries
from vernier.border.memory.arena import Arena, ArenaReader
from vernier.border.memory.placement import PlacedReader, place
from vernier.border.memory.running import RunningBatches
from vernier.border.records import wire
from vernier.border.records.channel import Channel
from vernier.border.records.messages import write_message
from vernier.errors import Draining, EngineError, VernierError
from vernier.tensors import numpy_dtype

logger = logging.getLogger(__name__)

#: Answers a call of a front, `{"type": "load", …}`; raises VernierError.
Call = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class SessionOwner(Protocol):
    """What a session asks of the engine process.

    Attributes:
        acknowledged: set whenever a front has acknowledged a catalogue.
        last_tries: of all fronts.
    """

    acknowledged: asyncio.Event
    last_tries: LastTries
    call: Call

    def model(self, number: int) -> ServedModel | None: ...

    def leave(self, session: FrontSession) -> None: ...

    def start(self, work: Coroutine[Any, Any, None]) -> None: ...


class FrontSession:
    """The target of a front's batches; belongs to the event loop's thread.

    Args:
        sock: to the front; belongs to the session from now on.
        requests_fd: memory that the front writes. answers_fd: memory that this process writes.
        running_fd: see RunningBatches. They are closed here.
    """

    def __init__(
        self,
        fronts: SessionOwner,
        sock: socket.socket,
        requests_fd: int,
        answers_fd: int,
        running_fd: int,
    ) -> None:
        self._fronts = fronts
        try:
            self._requests = ArenaReader(requests_fd)
            self._arena = Arena(answers_fd, os.fstat(answers_fd).st_size)
            self._running = RunningBatches(running_fd)
        except BaseException:
            sock.close()
            raise
        finally:
            for fd in (requests_fd, answers_fd, running_fd):
                os.close(fd)
        self._batches: dict[int, tuple[ServedModel, RequestBatch]] = {}
        self._starting: RequestBatch | None = None  # that is being submitted
        self._told_of = 0  # its requests that have ended already
        self._answers = 0
        self._unread: dict[
            int, list[Any]
        ] = {}  # memory of answers, by their numbers, that the front may read
        self.taken = 0  # the catalogue that the front has acknowledged
        self._channel = Channel(sock, self._take, self._lost)

    # --- in ---------------------------------------------------------------------------------------
    def _take(self, record: memoryview, fds: list[int]) -> None:
        try:
            kind = wire.kind_of(record)
            if kind == wire.SUBMIT:
                self._submit(record, fds)
            elif kind == wire.CONSUMED:
                for answer in wire.read_consumed(record):
                    self._unread.pop(answer, None)
            elif kind == wire.CANCEL:
                self._cancel(*wire.read_cancel(record))
            elif kind == wire.JSON:
                self._told(wire.read_json(record))
            else:
                raise wire.WireError(f"a record of kind {kind}")
        finally:
            for fd in fds:
                os.close(fd)

    def _submit(self, record: memoryview, fds: Sequence[int]) -> None:
        try:
            submission = wire.read_submission(record)
            model = self._fronts.model(submission.model)
            if model is None:
                self._refuse(submission)
                return
            batch = self._batch(model, submission, fds)
        except wire.WireError as fault:
            logger.error("a batch makes no sense", extra={"error": str(fault)})
            number = wire.submission_number(record)
            if number is not None and number not in self._batches:
                self._channel.write(wire.write_released(number))  # the front knows which requests are left
            return
        self._batches[submission.number] = model, batch
        if submission.last_try:
            self._fronts.last_tries.add(batch, partial(self._start, model, batch))
        else:
            self._start(model, batch)

    def _refuse(self, submission: wire.Submission) -> None:
        error = Draining(
            "the model was taken out of service while the request was on its way; send the request again"
        )
        self._channel.write(wire.write_failed(submission.number, range(len(submission.rows)), error))
        self._channel.write(wire.write_released(submission.number))

    def _start(self, model: ServedModel, batch: RequestBatch) -> None:
        self._starting, self._told_of = batch, 0
        try:
            model.scheduler.submit(batch)
        except Exception:  # cannot be; but its front would wait for ever
            logger.exception("a batch cannot be queued", extra={"model": model.name})
            self.released(batch)
            return
        finally:
            self._starting = None
        if self._told_of < len(batch):
            self._channel.write(wire.write_admitted(batch.tokens[0]))

    def _batch(self, model: ServedModel, submission: wire.Submission, fds: Sequence[int]) -> RequestBatch:
        """Raises WireError."""
        if submission.number in self._batches or submission.number == 0:
            raise wire.WireError(f"a batch of number {submission.number}, which there is already")
        signature, rows = model.signature, submission.rows
        arrays = wire.arrays_of(
            tuple(signature.inputs), submission.tensors, PlacedReader(self._requests, fds).read
        )
        every = sum(rows)
        for name, spec in signature.inputs.items():
            array = arrays[name]
            if array.dtype != numpy_dtype(spec.dtype) or array.ndim != len(spec.shape):
                raise wire.WireError(f"input '{name}' is of {array.dtype} and {array.ndim} dimensions")
            if signature.has_batch and len(array) != every:
                raise wire.WireError(f"input '{name}' has not {every} rows")
        if not signature.has_batch and every != 1:
            raise wire.WireError("several rows for a model without a batch axis")
        names = tuple(signature.outputs)
        numbers = submission.outputs
        if numbers is not None and (not numbers or max(numbers) >= len(names)):
            raise wire.WireError("an unknown output")
        return RequestBatch(
            arrays,
            rows,
            names if numbers is None else [names[at] for at in numbers],
            submission.precision,
            submission.priority,
            submission.arrivals,
            submission.deadlines,
            self,
            (submission.number,),
        )

    def _cancel(self, number: int, index: int) -> None:
        found = self._batches.get(number)
        if found is not None and index < len(found[1]):
            self._cancel_one(*found, index)

    def _cancel_one(self, model: ServedModel, batch: RequestBatch, index: int) -> None:
        if self._fronts.last_tries.withdraw(batch):
            self.released(batch)  # its only request
        else:
            model.scheduler.cancel(batch, index)

    def _told(self, message: dict[str, Any]) -> None:
        kind, number = message.get("type"), message.get("call")
        if kind == "taken":
            self.taken = int(message["generation"])
            self._fronts.acknowledged.set()
        elif kind in ("load", "unload") and isinstance(number, int):
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
        outputs = [answer.outputs[name] for name in batch.outputs]
        try:
            placed = place(outputs, self._arena, may_lie_there=False)
        except (OSError, MemoryError):
            logger.exception("an answer cannot be handed over")
            self.failed(batch, requests, EngineError("there was no memory for the answer"))
            return
        if batch is self._starting:
            self._told_of += len(requests)
        number = self._answers = self._answers + 1
        self._unread[number] = placed.kept
        record = wire.write_answered(number, batch.tokens[0], requests, answer, outputs, placed.places)
        self._channel.write(record, placed.fds)

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        if batch is self._starting:
            self._told_of += len(requests)
        self._channel.write(wire.write_failed(batch.tokens[0], requests, error))

    def released(self, batch: RequestBatch) -> None:
        number = batch.tokens[0]
        self._running.end(number)
        self._batches.pop(number, None)
        self._fronts.last_tries.ended(batch)
        self._channel.write(wire.write_released(number))

    def tell(self, message: dict[str, Any]) -> None:
        """Sends what is rare, such as the catalogue."""
        write_message(self._channel, message)

    # --- end --------------------------------------------------------------------------------------
    def _lost(self) -> None:
        """The front has died: nobody waits for its requests."""
        self._fronts.leave(self)
        self._unread.clear()
        open_batches = list(self._batches.values())
        if open_batches:
            logger.warning("a front has gone", extra={"batches": len(open_batches)})
        for model, batch in open_batches:
            for index in range(len(batch)):
                self._cancel_one(model, batch, index)

    def close(self) -> None:
        self._channel.close()
