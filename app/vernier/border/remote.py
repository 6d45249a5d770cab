"""The engine process as a front sees it: its models, and the requests that it owes an answer.

When the engine process dies, the front keeps its connections. Requests that waited are sent to the next engine process;
those that were running are tried once more, alone and last, so that a request which kills the process takes no other
with it; then they are told. While there is no engine process, at most `queue_limit` rows are held.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from vernier.border import wire
from vernier.border.arena import Arena, ArenaReader
from vernier.border.batch import Answer, RequestBatch, chosen
from vernier.border.catalogue import SchedulerObserver
from vernier.border.channel import Channel
from vernier.border.messages import read_message
from vernier.border.placement import Placed, PlacedReader, place
from vernier.border.resolution import find_model
from vernier.border.room import RoomPage
from vernier.border.running import RunningBatches
from vernier.border.signature import Signature
from vernier.errors import (
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineRestarting,
    NotReady,
    QueueFull,
    UnknownVersion,
    VernierError,
)
from vernier.exposition import Metrics
from vernier.metrics import ModelMetrics
from vernier.package.manifest import Manifest

logger = logging.getLogger(__name__)

#: Answers that are read before the engine process hears of it, where nothing else is sent.
_UNACKNOWLEDGED = 64
_ACKNOWLEDGE_S = 0.05
#: How often held requests are looked through for those whose deadline has come.
_EXPIRY_S = 0.02
_REFUSED = (QueueFull, Draining, NotReady)


class RemoteModel:
    """A model version in the engine process. Satisfies ServedModel, and is its own scheduler."""

    def __init__(self, engine: RemoteEngine, entry: dict[str, Any], metrics: ModelMetrics) -> None:
        manifest = Manifest.model_validate(entry["manifest"])
        self.number: int = entry["number"]
        self.name = manifest.name
        self.version = str(manifest.version)
        self.signature = Signature.of(manifest)
        self.metrics = metrics
        self.inflight = 0
        self._engine = engine
        self._all_outputs = tuple(self.signature.outputs)
        self.update(entry)

    def update(self, entry: dict[str, Any]) -> None:
        """Takes what changes while a version is served."""
        self.precision: str = entry["precision"]
        self.precisions: tuple[str, ...] = tuple(entry["precisions"])
        self.runtime: str = entry["runtime"]
        self.state: str = entry["state"]
        self._description: dict[str, Any] = entry["description"]

    @property
    def scheduler(self) -> RemoteModel:
        return self

    def description(self) -> dict[str, Any]:
        return self._description

    def submit(self, batch: RequestBatch) -> None:
        self._engine.submit(self, batch)

    def cancel(self, batch: RequestBatch, index: int) -> None:
        self._engine.cancel(batch, index)

    def refusal(
        self, precision: str | None = None, priority: int = 0, deadline: float | None = None
    ) -> VernierError | None:
        """What the engine process has published; it decides when it gets the batch."""
        return self._engine.refusal(self)

    def refused(self, error: VernierError, count: int = 1, rows: int = 1) -> None:
        self.metrics.rejected(error.reason if isinstance(error, QueueFull) else error.code, count)

    def watch(self, observer: SchedulerObserver) -> None:
        raise TypeError("a scheduler is watched where it runs")

    # --- for the records --------------------------------------------------------------------------
    def precision_number(self, precision: str | None) -> int:
        return 0 if precision is None else 1 + self.precisions.index(precision)

    def precision_of(self, number: int) -> str:
        return self.precisions[number - 1]

    def output_numbers(self, names: Sequence[str]) -> list[int] | None:
        return None if tuple(names) == self._all_outputs else [self._all_outputs.index(n) for n in names]

    # --- books ------------------------------------------------------------------------------------
    def left(self, requests: int, outcome: str | None, admitted: bool) -> None:
        """Requests have ended.

        Args:
            outcome: as they are counted; None when they were refused.
            admitted: whether they have been counted as admitted.
        """
        self.inflight -= requests
        self.metrics.set_inflight(self.inflight)
        if outcome is None and admitted:
            outcome = "failed"  # by an engine process that took the place of the one that had admitted them
        if outcome is not None:
            if not admitted:
                self.metrics.admitted(requests)
            self.metrics.ended(outcome, requests)


class _OpenBatch:
    """A batch that the engine process has, or will get."""

    __slots__ = ("admitted", "batch", "ended", "left", "model", "number", "placed", "tries")

    def __init__(self, number: int, model: RemoteModel, batch: RequestBatch) -> None:
        self.number = number
        self.model = model
        self.batch = batch
        self.left = len(batch)
        self.ended = bytearray(self.left)
        self.placed: Placed | None = None
        self.admitted = False
        self.tries = 0  # engine processes that died while they ran it

    def end(self, requests: Sequence[int]) -> list[int]:
        """Those of them that had not ended; they have now."""
        ended = self.ended
        ending = [at for at in requests if not ended[at]]
        for at in ending:
            ended[at] = 1
        self.left -= len(ending)
        return ending

    def open(self) -> list[int]:
        return [at for at, ended in enumerate(self.ended) if not ended]


class _Remainder:
    """The target of what is left of a batch whose other requests have ended: tells the batch's own."""

    def __init__(self, batch: RequestBatch, places: Sequence[int]) -> None:
        self._batch = batch
        self._places = places

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        start = 0
        for at in requests:
            rows = batch.rows[at]
            outputs = {name: array[start : start + rows] for name, array in answer.outputs.items()}
            own = Answer(outputs, answer.precision, answer.queue_s, answer.compute_s, answer.batch_size)
            index = self._places[at]
            self._batch.target.answered(self._batch, range(index, index + 1), own)
            start += rows

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        self._batch.target.failed(self._batch, [self._places[at] for at in requests], error)

    def released(self, batch: RequestBatch) -> None:
        self._batch.target.released(self._batch)


class RemoteEngine:
    """Satisfies Catalogue. Belongs to the event loop's thread.

    Args:
        arena: what this front writes.
        metrics: where models are counted.
        queue_limit: rows that are held while there is no engine process.
        on_change: called when readiness may have changed.
    """

    def __init__(
        self, arena: Arena, metrics: Metrics, queue_limit: int, on_change: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._arena = arena
        self._metrics = metrics
        self._queue_limit = queue_limit
        self._on_change = on_change
        self._channel: Channel | None = None
        self._answers: ArenaReader | None = None
        self._running: RunningBatches | None = None
        self._room: RoomPage | None = None
        self._numbers = count(1)
        self._open: dict[int, _OpenBatch] = {}  # in the order of their numbers
        self._held: list[_OpenBatch] = []
        self._held_rows = 0
        self._suspects: set[int] = set()
        self._read = self._acknowledged = 0
        self._acknowledging: asyncio.TimerHandle | None = None
        self._models: dict[int, RemoteModel] = {}
        self._served: dict[str, dict[int, RemoteModel]] = {}
        self._awaited: dict[str, list[int]] = {}
        self._reason: str | None = "the engine process is starting"
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._expiring: asyncio.TimerHandle | None = None
        self._ready_once = False

    # --- the engine process comes and goes --------------------------------------------------------
    def attach(self, sock: socket.socket, answers_fd: int, running_fd: int, room_fd: int) -> None:
        """A new engine process is there; the one before has been reaped. The descriptors are closed."""
        if self._channel is not None:
            self._channel.close()
            self._lost()
        self._answers = ArenaReader(answers_fd)
        self._running = RunningBatches(running_fd)
        self._room = RoomPage(room_fd)
        for fd in (answers_fd, running_fd, room_fd):
            os.close(fd)
        self._read = self._acknowledged = 0
        self._channel = Channel(sock, self._take, self._lost)

    def _lost(self) -> None:
        """The engine process has died."""
        self._channel = None
        self._reason = (
            "the engine process is being restarted" if self._ready_once else "the engine process is starting"
        )
        running = self._running.numbers() if self._running is not None else set()
        for open_batch in self._open.values():
            open_batch.placed = None
            if open_batch.number in running:
                open_batch.tries += 1
                self._suspects.add(open_batch.number)
        self._held = list(self._open.values())
        self._open = {}
        self._held_rows = sum(sum(held.batch.rows) for held in self._held)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(
                    EngineRestarting("the engine process ended before it had answered; try again")
                )
        self._calls.clear()
        self._expire_soon()
        self._on_change()
        logger.error("engine process lost", extra={"held": len(self._held), "suspects": len(self._suspects)})

    def _send_held(self) -> None:
        """Sends what waited for an engine process; batches that may have killed the last one go last."""
        held, self._held, self._held_rows = self._held, [], 0
        for open_batch in sorted(held, key=lambda one: (one.number in self._suspects, one.number)):
            if not open_batch.left:
                continue
            suspect = open_batch.number in self._suspects
            self._suspects.discard(open_batch.number)
            if open_batch.tries > 1:
                self._fail(
                    open_batch,
                    open_batch.open(),
                    EngineError("two engine processes died while they ran this request"),
                )
                continue
            old = open_batch.model
            model = self._served.get(old.name, {}).get(int(old.version))
            if model is None or model.signature != old.signature:
                error = UnknownVersion(f"model '{old.name}' has no version '{old.version}' any more")
                self._fail(open_batch, open_batch.open(), error)
                continue
            if suspect:
                self._send_each(model, open_batch)
            else:
                self._send(model, self._remaining(model, open_batch))

    def _remaining(self, model: RemoteModel, open_batch: _OpenBatch) -> _OpenBatch:
        """What is left of a batch, as a batch."""
        if open_batch.left == len(open_batch.batch):
            moved = _OpenBatch(open_batch.number, model, open_batch.batch)
            moved.tries, moved.admitted = open_batch.tries, open_batch.admitted
            open_batch.batch.state = moved
            self._move(open_batch.model, model, moved.left)
            return moved
        return self._part(model, open_batch, open_batch.open())

    def _part(self, model: RemoteModel, open_batch: _OpenBatch, places: Sequence[int]) -> _OpenBatch:
        batch = open_batch.batch
        deadlines = batch.deadlines
        part = RequestBatch(
            chosen(batch.inputs, batch.rows, places) if len(batch) > 1 else batch.inputs,
            [batch.rows[at] for at in places],
            batch.outputs,
            batch.precision,
            batch.priority,
            [batch.arrivals[at] for at in places],
            None if deadlines is None else [deadlines[at] for at in places],
            _Remainder(batch, places),
        )
        moved = _OpenBatch(next(self._numbers), model, part)
        moved.tries, moved.admitted = open_batch.tries, open_batch.admitted
        part.state = moved
        self._move(open_batch.model, model, len(places))
        parts = batch.state if isinstance(batch.state, dict) else {}
        for at, index in enumerate(places):
            parts[index] = (moved, at)
        batch.state = parts
        return moved

    @staticmethod
    def _move(old: RemoteModel, new: RemoteModel, requests: int) -> None:
        old.inflight -= requests
        old.metrics.set_inflight(old.inflight)
        new.inflight += requests
        new.metrics.set_inflight(new.inflight)

    def _send_each(self, model: RemoteModel, open_batch: _OpenBatch) -> None:
        """Requests of a batch that was running, each alone."""
        for at in open_batch.open():
            self._send(model, self._part(model, open_batch, [at]), last_try=True)

    def _expire_soon(self) -> None:
        if self._expiring is None and self._held:
            self._expiring = self._loop.call_later(_EXPIRY_S, self._expire_held)

    def _expire_held(self) -> None:
        self._expiring = None
        if self._channel is not None and self._reason is None:
            return
        now = time.monotonic()
        for held in self._held:
            deadlines = held.batch.deadlines
            if deadlines is not None:
                late = [at for at in held.open() if deadlines[at] <= now]
                if late:
                    error = DeadlineExceeded("the deadline passed while the engine process was restarted")
                    self._fail(held, late, error)
        self._held = [held for held in self._held if held.left]
        self._held_rows = sum(sum(held.batch.rows) for held in self._held)
        self._expire_soon()

    # --- requests ---------------------------------------------------------------------------------
    def refusal(self, model: RemoteModel) -> VernierError | None:
        """Why no request would be queued now; None when one would."""
        if self._channel is not None and self._room is not None and self._room.rows(model.number) <= 0:
            return QueueFull(
                "as many rows wait already as may; retry after the given time",
                self._room.retry_after_s(model.number),
            )
        if (self._channel is None or not self._served) and self._held_rows >= self._queue_limit:
            return self._restarting()
        return None

    def _restarting(self) -> EngineRestarting:
        return EngineRestarting(
            f"{self._held_rows} rows wait already for the engine process, which is being restarted; try again soon"
        )

    def submit(self, model: RemoteModel, batch: RequestBatch) -> None:
        requests = len(batch)
        open_batch = _OpenBatch(next(self._numbers), model, batch)
        batch.state = open_batch
        model.inflight += requests
        model.metrics.set_inflight(model.inflight)
        if self._channel is not None and model.number in self._models:
            self._send(model, open_batch)
            return
        rows = sum(batch.rows)
        if self._held_rows + rows > self._queue_limit:
            self._fail(open_batch, range(requests), self._restarting())
            batch.target.released(batch)
            return
        self._held.append(open_batch)
        self._held_rows += rows
        self._expire_soon()

    def _send(self, model: RemoteModel, open_batch: _OpenBatch, last_try: bool = False) -> None:
        channel, batch = self._channel, open_batch.batch
        assert channel is not None
        try:
            placed = place(batch.inputs.values(), self._arena)
        except (OSError, MemoryError):
            error = NotReady("there is no memory for the request now; try again soon")
            self._fail(open_batch, open_batch.open(), error)
            batch.target.released(batch)
            return
        open_batch.placed = placed
        record = wire.write_submission(
            open_batch.number,
            model.number,
            batch,
            placed.places,
            model.precision_number(batch.precision),
            model.output_numbers(batch.outputs),
            last_try,
        )
        self._open[open_batch.number] = open_batch
        self._acknowledge()
        channel.write(record, placed.fds)

    def cancel(self, batch: RequestBatch, index: int) -> None:
        state = batch.state
        if isinstance(state, dict):
            if index not in state:
                return
            open_batch, index = state[index]
        else:
            open_batch = state
        if open_batch is None or not open_batch.end((index,)):
            return
        open_batch.model.left(1, "cancelled", open_batch.admitted)
        if self._channel is not None and open_batch.number in self._open:
            self._channel.write(wire.write_cancel(open_batch.number, index))

    # --- what the engine process tells ------------------------------------------------------------
    def _take(self, record: memoryview, fds: list[int]) -> None:
        try:
            kind = wire.kind_of(record)
            if kind == wire.ANSWERED:
                self._answered(wire.read_answered(record), fds)
            elif kind == wire.RELEASED:
                self._released(wire.read_number(record))
            elif kind == wire.ADMITTED:
                self._admitted(wire.read_number(record))
            elif kind == wire.FAILED:
                number, requests, error = wire.read_failed(record)
                open_batch = self._open.get(number)
                if open_batch is not None:
                    self._fail(open_batch, requests, error)
            elif kind == wire.JSON:
                self._told(read_message(record, fds))
        finally:
            for fd in fds:
                os.close(fd)

    def _answered(self, answered: wire.Answered, fds: Sequence[int]) -> None:
        self._read += 1
        open_batch = self._open.get(answered.number)
        if open_batch is None:
            return
        assert self._answers is not None
        batch, model, requests = open_batch.batch, open_batch.model, answered.requests
        if requests.stop > len(batch):
            raise wire.WireError("an answer to more requests than a batch has")
        reader = PlacedReader(self._answers, fds)
        outputs = wire.arrays_of(batch.outputs, answered.tensors, reader.read)
        answer = Answer(
            outputs,
            model.precision_of(answered.precision),
            answered.queue_s,
            answered.compute_s,
            answered.batch_size,
        )
        ending = open_batch.end(requests)
        if not ending:
            return
        model.left(len(ending), "answered", open_batch.admitted)
        batch.target.answered(batch, requests, answer)
        if self._read - self._acknowledged >= _UNACKNOWLEDGED:
            self._acknowledge()
        elif self._acknowledging is None:
            self._acknowledging = self._loop.call_later(_ACKNOWLEDGE_S, self._acknowledge_late)

    def _admitted(self, number: int) -> None:
        open_batch = self._open.get(number)
        if open_batch is not None and not open_batch.admitted:
            open_batch.admitted = True
            open_batch.model.metrics.admitted(open_batch.left)

    def _acknowledge_late(self) -> None:
        self._acknowledging = None
        self._acknowledge()

    def _acknowledge(self) -> None:
        """The memory of the answers that were read may be used again."""
        if self._read != self._acknowledged and self._channel is not None:
            self._acknowledged = self._read
            self._channel.write(wire.write_consumed(self._read))

    def _released(self, number: int) -> None:
        open_batch = self._open.pop(number, None)
        if open_batch is None:
            return
        if open_batch.left:  # cannot be: every request has ended before
            error = EngineError("the engine process forgot a request")
            self._fail(open_batch, open_batch.open(), error)
        open_batch.batch.state = None
        open_batch.batch.target.released(open_batch.batch)

    def _fail(self, open_batch: _OpenBatch, requests: Sequence[int], error: VernierError) -> None:
        ending = open_batch.end(requests)
        if not ending:
            return
        outcome: str | None = "failed"
        if isinstance(error, _REFUSED):
            outcome = None
        elif isinstance(error, DeadlineExceeded):
            outcome = "expired"
        open_batch.model.left(len(ending), outcome, open_batch.admitted)
        open_batch.batch.target.failed(open_batch.batch, ending, error)

    # --- the catalogue ----------------------------------------------------------------------------
    def _told(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "catalogue":
            self._take_catalogue(message)
        elif kind == "result":
            future = self._calls.pop(message["call"], None)
            if future is not None and not future.done():
                future.set_result(message)

    def _take_catalogue(self, message: dict[str, Any]) -> None:
        models: dict[int, RemoteModel] = {}
        served: dict[str, dict[int, RemoteModel]] = {}
        for entry in message["models"]:
            model = self._models.get(entry["number"])
            if model is None:
                name, version = entry["manifest"]["name"], str(entry["manifest"]["version"])
                model = RemoteModel(self, entry, self._metrics.model(name, version))
            else:
                model.update(entry)
            models[model.number] = model
            served.setdefault(model.name, {})[int(model.version)] = model
        for name, version in {(m.name, m.version) for m in self._models.values()} - {
            (m.name, m.version) for m in models.values()
        }:
            if self._reason is None:  # else the next engine process is only loading it
                self._metrics.forget(name, version)
        self._models, self._served = models, served
        self._awaited = message["awaited"]
        self._reason = message["reason"]
        if self._reason is None:
            self._ready_once = True
        if self._channel is not None:
            self._channel.write(wire.write_json({"type": "taken", "generation": message["generation"]}))
        if self._held and not message["starting"]:
            self._send_held()
        self._on_change()

    def models(self) -> list[RemoteModel]:
        return [self._served[name][v] for name in sorted(self._served) for v in sorted(self._served[name])]

    def resolve(self, name: str | None, version: str | None) -> RemoteModel:
        return find_model(self._served, self._awaited, name, version, self.not_ready_reason)

    def not_ready_reason(self) -> str | None:
        return self._reason

    async def load(self, name: str, version: int | None = None) -> RemoteModel:
        result = await self._call({"type": "load", "name": name, "version": version})
        return self.resolve(name, str(result["version"]))

    async def unload(self, name: str, version: int | None = None) -> None:
        await self._call({"type": "unload", "name": name, "version": version})

    async def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._channel is None:
            raise EngineRestarting("the engine process is being restarted; try again soon")
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._calls[number] = future
        self._channel.write(wire.write_json({**message, "call": number}))
        try:
            result = await future
        finally:
            self._calls.pop(number, None)
        if "error" in result:
            raise wire.error_of(result["error"])
        return result

    # --- end --------------------------------------------------------------------------------------
    @property
    def open_requests(self) -> int:
        return sum(held.left for held in (*self._open.values(), *self._held))

    def _all(self) -> Iterator[_OpenBatch]:
        yield from self._open.values()
        yield from self._held

    def close(self) -> None:
        """Fails what is still open."""
        error = Draining("the service stopped before the request could run; send it to another instance")
        for open_batch in list(self._all()):
            self._fail(open_batch, open_batch.open(), error)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for handle in (self._acknowledging, self._expiring):
            if handle is not None:
                handle.cancel()
