"""The engine process's side of the border: batches of every front go to the schedulers, answers go back.

A catalogue says what is served. A model version leaves in two steps: fronts are told that it is gone, and once each has
acknowledged, nothing can be on its way to it any more and it is drained.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import count
from typing import Any

from vernier.border.batch import RequestBatch
from vernier.border.catalogue import ServedModel
from vernier.border.engine_side.front_session import Call, FrontSession
from vernier.border.engine_side.last_tries import LastTries
from vernier.border.memory.room import RoomPage

logger = logging.getLogger(__name__)

#: How long a front may take to acknowledge a catalogue before it is not waited for.
_ACKNOWLEDGE_S = 5.0


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
        last_tries: of all fronts.
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
        self.last_tries = LastTries()
        self._sessions: set[FrontSession] = set()
        self._numbers = count(1)
        self._number: dict[int, int] = {}  # by the identity of a model that is kept in `_models`
        self._models: dict[int, ServedModel] = {}
        self._generation = 0
        self._told: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def join(self, session: FrontSession) -> None:
        self.publish()  # else the others would miss what has changed since the last time
        self._sessions.add(session)
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
