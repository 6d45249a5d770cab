"""All engine processes as a front sees them: one catalogue. A batch goes to the engine process that is least busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from typing import Any

from vernier.border.front_side.books import Bookkeeper
from vernier.border.front_side.remote import RemoteEngine
from vernier.border.front_side.remote_model import RemoteModel
from vernier.border.front_side.replicated_model import ReplicatedModel
from vernier.border.memory.arena import Arena
from vernier.border.resolution import find_model
from vernier.errors import UnknownModel, UnknownVersion, VernierError
from vernier.exposition import Metrics

Served = dict[str, dict[int, ReplicatedModel]]


class EngineGroup:
    """Satisfies Catalogue. Belongs to the event loop's thread.

    Args:
        arena: what this front writes.
        metrics: where models are counted.
        queue_limit: rows that are held for an engine process while it is restarted.
        engines: how many engine processes there are.
        on_change: called with the number of an engine process whose models, readiness or connection may have changed.
        first: of which the models are listed, and which is taken when several are equally busy; fronts differ in it.
        clock: the one that deadlines are on.

    Attributes:
        engines: by their numbers.
    """

    def __init__(
        self,
        arena: Arena,
        metrics: Metrics,
        queue_limit: int,
        engines: int = 1,
        on_change: Callable[[int], None] = lambda number: None,
        first: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_change = on_change
        books, numbers = Bookkeeper(metrics), count(1)
        self.engines = [
            RemoteEngine(arena, books, queue_limit, partial(self._changed, number), clock, numbers)
            for number in range(engines)
        ]
        for engine in self.engines:
            engine.others = [other for other in self.engines if other is not engine]
        start = first % engines
        self._in_order = self.engines[start:] + self.engines[:start]
        self._served: Served = {}
        self._default: Served = {}
        self._awaited: dict[str, list[int]] = {}

    # --- the catalogue ----------------------------------------------------------------------------
    def _changed(self, number: int) -> None:
        self._refresh()
        self._on_change(number)

    def _refresh(self) -> None:
        replicas: dict[tuple[str, int], list[RemoteModel]] = {}
        awaited: dict[str, list[int]] = {}
        for engine in self._in_order:
            for replica in engine.catalogue.models():
                replicas.setdefault((replica.name, int(replica.version)), []).append(replica)
            for name, versions in engine.catalogue.awaited.items():
                awaited[name] = sorted({*awaited.get(name, ()), *versions})
        loaded = [engine for engine in self.engines if not engine.catalogue.starting]
        served: Served = {}
        default: Served = {}
        for (name, version), found in sorted(replicas.items()):
            known = self._served.get(name, {}).get(version)
            if known is None or not known.update(found):
                known = ReplicatedModel(found)
            served.setdefault(name, {})[version] = known
            if all(engine.catalogue.serves(name, version) for engine in loaded):
                default.setdefault(name, {})[version] = known
        self._served, self._awaited = served, awaited
        self._default = {name: default.get(name) or versions for name, versions in served.items()}

    def models(self) -> list[ReplicatedModel]:
        """Every served version, by name and version."""
        return [model for versions in self._served.values() for model in versions.values()]

    def resolve(self, name: str | None, version: str | None) -> ReplicatedModel:
        """The version asked for, or the newest that all engine processes serve. Raises UnknownModel, UnknownVersion,
        NotReady."""
        served = self._default if version is None else self._served
        return find_model(served, self._awaited, name, version, self.not_ready_reason)

    def not_ready_reason(self) -> str | None:
        """None when an engine process can execute every model, and no other one is starting for the first time."""
        reasons = {number: engine.catalogue.reason for number, engine in enumerate(self.engines)}
        if len(self.engines) == 1:
            return reasons[0]
        starting = [
            number
            for number, engine in enumerate(self.engines)
            if reasons[number] and not (engine.catalogue.ready_once or engine.catalogue.lost_once)
        ]
        if None in reasons.values() and not starting:
            return None
        number = starting[0] if starting else 0
        return f"engine process {number}: {reasons[number]}"

    # --- administration ---------------------------------------------------------------------------
    async def load(self, name: str, version: int | None = None) -> ReplicatedModel:
        """Loads a version, the newest by default, in every engine process. Raises what the first that fails raises; the
        others keep what they have loaded, and requests that name no version go on as before."""
        loaded = await self._in_all(lambda engine: engine.calls.load(name, version))
        return self.resolve(name, str(max(loaded)))

    async def unload(self, name: str, version: int | None = None) -> None:
        """Takes a version, or all, out of service wherever it is served. Raises UnknownModel, UnknownVersion."""
        await self._in_all(lambda engine: engine.calls.unload(name, version), (UnknownModel, UnknownVersion))

    async def _in_all(
        self,
        call: Callable[[RemoteEngine], Awaitable[Any]],
        allowed: tuple[type[VernierError], ...] = (),
    ) -> list[Any]:
        """The results of every engine process that has not failed.

        Args:
            allowed: errors that count only when no engine process has succeeded.
        """
        outcomes = await asyncio.gather(*map(call, self.engines), return_exceptions=True)
        results = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        grave = [failure for failure in failures if not isinstance(failure, allowed)]
        if grave or not results:
            raise (grave or failures)[0]
        return results

    # --- end --------------------------------------------------------------------------------------
    @property
    def open_requests(self) -> int:
        return sum(engine.open_requests for engine in self.engines)

    def close(self) -> None:
        """Fails what is still open."""
        for engine in self.engines:
            engine.others = ()
        for engine in self.engines:
            engine.close()
