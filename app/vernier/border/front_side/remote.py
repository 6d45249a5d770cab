"""The engine process as a front sees it: its models, and the requests that it owes an answer.

When it dies, the front keeps its connections. Requests that waited are sent to the next engine process; those that were
running are tried once more, each alone and last, so that a request which kills the process takes no other with it.
Meanwhile at most `queue_limit` rows are held. Other engine processes take what waited at once, the rest after a while.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vernier.border.batch import RequestBatch
from vernier.border.front_side.books import Bookkeeper, outcome_of
from vernier.border.front_side.held import HeldParts
from vernier.border.front_side.open_batches import OpenBatch, Part
from vernier.border.front_side.remote_calls import RemoteCalls
from vernier.border.front_side.remote_catalogue import RemoteCatalogue
from vernier.border.front_side.remote_model import RemoteModel
from vernier.border.memory.answer_memory import AnswerMemory
from vernier.border.memory.arena import Arena
from vernier.border.memory.placement import place
from vernier.border.memory.room import RoomPage
from vernier.border.memory.running import RunningBatches
from vernier.border.records import wire
from vernier.border.records.channel import Channel
from vernier.border.records.messages import read_message
from vernier.errors import (
    Draining,
    EngineError,
    EngineRestarting,
    NotReady,
    QueueFull,
    UnknownVersion,
    VernierError,
)

logger = logging.getLogger(__name__)

#: How often held requests are looked through for those whose deadline has come.
_EXPIRY_S = 0.02
#: Engine processes that may die while they run a request.
_MAX_TRIES = 2
#: How long requests that may have killed an engine process wait for it before another one has to take them.
_SUSPECTS_WAIT_S = 10.0


class RemoteEngine:
    """Belongs to the event loop's thread.

    Args:
        arena: what this front writes.
        books: of all engine processes.
        queue_limit: rows that are held while there is no engine process.
        on_change: called when models, readiness, or `connected`, may have changed.
        clock: the one that deadlines are on.
        numbers: of parts, of all engine processes.

    Attributes:
        calls: of an administrator.
        catalogue: what the engine process has told of its models.
        open_rows: that have been sent, and that the engine process may still read.
        others: engine processes that take what waits for this one when it dies.
    """

    def __init__(
        self,
        arena: Arena,
        books: Bookkeeper,
        queue_limit: int,
        on_change: Callable[[], None],
        clock: Callable[[], float],
        numbers: Iterator[int],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._arena = arena
        self._queue_limit = queue_limit
        self._on_change = on_change
        self._clock = clock
        self.catalogue = RemoteCatalogue(self, books)
        self.open_rows = 0
        self.others: Sequence[RemoteEngine] = ()
        self._channel: Channel | None = None
        self._answers: AnswerMemory | None = None
        self._running: RunningBatches | None = None
        self._room: RoomPage | None = None
        self._numbers = numbers
        self._open: dict[int, Part] = {}  # by number: what the engine process has
        self._held = HeldParts()
        self._lost_at = 0.0
        self._expiring: asyncio.TimerHandle | None = None
        self.calls = RemoteCalls(self._write, lambda: self.connected)

    # --- the engine process comes and goes --------------------------------------------------------
    @property
    def connected(self) -> bool:
        """Whether there is an engine process, ready or not."""
        return self._channel is not None

    def attach(self, sock: socket.socket, answers_fd: int, running_fd: int, room_fd: int) -> None:
        """A new engine process is there; the one before has been reaped. The descriptors are closed."""
        if self._channel is not None:
            self._channel.close()
            self._lost()
        try:
            answers = AnswerMemory(answers_fd, self._write)
            running, room = RunningBatches(running_fd), RoomPage(room_fd)
        except BaseException:
            sock.close()
            raise
        finally:
            for fd in (answers_fd, running_fd, room_fd):
                os.close(fd)
        self._answers, self._running, self._room = answers, running, room
        self._channel = Channel(sock, self._take, self._lost)

    def _write(self, record: bytes) -> None:
        if self._channel is not None:
            self._channel.write(record)

    def _lost(self) -> None:
        """The engine process has died, and reads nothing any more."""
        self._channel = None
        self.catalogue.lost()
        running = self._running.numbers() if self._running is not None else set()
        if self._answers is not None:
            self._answers.close()
        self._answers = self._running = self._room = None
        parts, self._open, self.open_rows = self._open, {}, 0
        suspects = 0
        for part in parts.values():
            part.placed = None
            if part.number in running:
                part.tries += 1
                suspects += 1
            if part.tries < _MAX_TRIES:
                self._held.add(part)
            else:
                fatal = EngineError("two engine processes died while they ran this request")
                part.give_up(part.living(), fatal)
        self._lost_at = self._clock()
        self.calls.lost()
        self._expire_soon()
        self._on_change()
        self._hand_over()
        logger.error("engine process lost", extra={"held": len(self._held), "suspects": suspects})

    def _send_held(self) -> None:
        """Sends what waited for an engine process and can be sent, or will never be."""
        starting = self.catalogue.starting
        for part in self._held.in_order():
            if self._channel is None:
                return  # it has died in the meantime
            model = self.catalogue.current(part.whole.model)
            if part not in self._held or (starting and (model is None or part.tries)):
                continue
            self._held.remove(part)
            living = part.living()
            if not living:
                part.drop()
            elif model is None:
                old = part.whole.model
                gone = UnknownVersion(f"model '{old.name}' has no version '{old.version}' any more")
                part.give_up(living, gone)
            elif part.tries:
                self._send_split(model, part, [(at,) for at in living])
            elif len(living) < len(part.places):
                self._send_split(model, part, [living])
            else:
                self._send(model, part)

    def _send_split(self, model: RemoteModel, part: Part, pieces: Sequence[Sequence[int]]) -> None:
        """Sends what is left of a part in parts of its own."""
        made = [part.split(next(self._numbers), places) for places in pieces]
        part.drop()
        for one in made:
            if self._channel is None:
                self._held.add(one)
            else:
                self._send(model, one)

    def _expire_soon(self) -> None:
        if self._expiring is None and self._held:
            self._expiring = self._loop.call_later(_EXPIRY_S, self._expire_held)

    def _hand_over(self) -> None:
        """Gives to other engine processes what waits for this one, if it does not have the model."""
        may_come_back = self.catalogue.starting and self._clock() < self._lost_at + _SUSPECTS_WAIT_S
        for part in self._held.in_order() if self.others else ():
            if (part.tries and may_come_back) or self.has(part.whole.model):
                continue
            taking = [other for other in self.others if other._has_room_for(part)]
            if taking:
                self._held.remove(part)
                min(taking, key=lambda other: other.open_rows)._adopt(part)

    def _has_room_for(self, part: Part) -> bool:
        model, room = self.catalogue.current(part.whole.model), self._room
        return model is not None and room is not None and room.rows(model.number) >= part.living_rows()

    def _adopt(self, part: Part) -> None:
        part.carrier = self
        self._held.add(part)
        self._send_held()

    def _expire_held(self) -> None:
        self._expiring = None
        self._hand_over()
        self._held.expire(self._clock())
        self._expire_soon()

    # --- requests ---------------------------------------------------------------------------------
    def has(self, model: RemoteModel) -> bool:
        """Whether requests for it can be sent now."""
        return self.catalogue.current(model) is not None

    def refusal(self, model: RemoteModel) -> VernierError | None:
        """Why no request would be queued now; None when one would."""
        current = self.catalogue.current(model)
        if current is None:
            return self._restarting() if self._held.rows >= self._queue_limit else None
        if self._room is not None and self._room.rows(current.number) <= 0:
            return QueueFull(
                "as many rows wait already as may; retry after the given time",
                self._room.retry_after_s(current.number),
            )
        return None

    def _restarting(self) -> EngineRestarting:
        return EngineRestarting(
            f"{self._held.rows} rows wait already for the engine process, which is being restarted; try again soon"
        )

    def submit(self, model: RemoteModel, batch: RequestBatch) -> None:
        requests = len(batch.rows)
        whole = OpenBatch(model, batch)
        model.books.taken(requests)
        current = self.catalogue.current(model)
        if current is not None and requests <= wire.MAX_REQUESTS:  # the most frequent case of the next
            self._send(current, Part(self, next(self._numbers), whole, range(requests)))
            return
        pieces = [
            range(start, min(requests, start + wire.MAX_REQUESTS))
            for start in range(0, requests, wire.MAX_REQUESTS)
        ]
        for part in [Part(self, next(self._numbers), whole, places) for places in pieces]:
            if current is not None and self._channel is not None:
                self._send(current, part)
            elif self._channel is not None and not self.catalogue.starting:
                leaving = Draining(
                    f"model '{model.name}' is being taken out of service; send the request again"
                )
                part.give_up(part.places, leaving)
            elif self._held.rows + part.living_rows() > self._queue_limit:
                part.give_up(part.places, self._restarting())
            else:
                self._held.add(part)
        self._expire_soon()

    def _send(self, model: RemoteModel, part: Part) -> None:
        channel = self._channel
        assert channel is not None
        try:
            arrays = part.inputs(model.signature)
            part.placed = placed = place(arrays, self._arena)
        except (OSError, MemoryError):
            error = NotReady("there is no memory for the request now; try again soon")
            part.give_up(part.living(), error)
            return
        part.rows = len(arrays[0]) if model.signature.has_batch else 1
        self.open_rows += part.rows
        record = part.record(model, arrays, placed)
        self._open[part.number] = part
        if self._answers is not None:
            self._answers.acknowledge()
        channel.write(record, placed.fds)

    def withdraw(self, part: Part, request: int, number: int) -> None:
        """Ends a request without telling; see Carrier."""
        part.whole.model.books.left(1, "cancelled", part.admitted)
        if part in self._held:
            self._held.withdraw(part, request)
        else:
            part.whole.end((request,))
            self._write(wire.write_cancel(part.number, number))

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
                self._failed(*wire.read_failed(record))
            elif kind == wire.JSON:
                self._told(read_message(record, fds))
            else:
                raise wire.WireError(f"a record of kind {kind}")
        finally:
            for fd in fds:
                os.close(fd)

    def _answered(self, answered: wire.Answered, fds: Sequence[int]) -> None:
        memory, part = self._answers, self._open.get(answered.number)
        assert memory is not None
        answer = None
        try:
            if part is not None:
                answer = part.read_answer(memory, answered, fds)
        finally:
            if answer is None:
                memory.skip(answered)
        if part is not None and answer is not None:
            part.answer(answered.requests, answer)
            del answer  # nothing here should keep its memory
        if memory is self._answers:
            memory.acknowledge_soon()

    def _admitted(self, number: int) -> None:
        part = self._open.get(number)
        if part is not None and not part.admitted:
            part.admitted = True
            part.whole.model.metrics.admitted(len(part.living()))

    def _released(self, number: int) -> None:
        part = self._open.pop(number, None)
        if part is None:
            return
        part.placed = None
        self.open_rows -= part.rows
        living = part.living()
        if living:  # cannot be: every request has ended before
            part.fail(living, EngineError("the engine process forgot a request"), "failed")
        part.drop()

    def _failed(self, number: int, requests: Sequence[int], error: VernierError) -> None:
        part = self._open.get(number)
        if part is None:
            return
        places = part.places
        if requests and max(requests) >= len(places):
            raise wire.WireError("more requests have failed than a batch has")
        part.fail([places[at] for at in requests], error, outcome_of(error, part.admitted))

    # --- the catalogue ----------------------------------------------------------------------------
    def _told(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "catalogue":
            self.catalogue.take(message)
            self._write(wire.write_json({"type": "taken", "generation": message["generation"]}))
            self._hand_over()
            self._send_held()
            self._on_change()
        elif kind == "result":
            self.calls.answered(message)

    # --- end --------------------------------------------------------------------------------------
    @property
    def open_requests(self) -> int:
        return sum(len(part.living()) for part in (*self._open.values(), *self._held))

    def close(self) -> None:
        """Fails what is still open."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self.catalogue.lost()
        error = Draining("the service stopped before the request could run; send it to another instance")
        parts = [*self._open.values(), *self._held]
        self._open, self._held = {}, HeldParts()
        for part in parts:
            part.placed = None
            part.give_up(part.living(), error)
        if self._answers is not None:
            self._answers.close()
        if self._expiring is not None:
            self._expiring.cancel()
