"""The figures of all processes, those that have ended among them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from vernier.exposition_merge import Totals
from vernier.processes.places import Process, ProcessPlace

logger = logging.getLogger("vernier")

_COLLECT_S = 2.0
#: How often figures are collected, so that those of a process that dies are not lost.
_KEEP_S = 1.0


class Figures:
    """Belongs to the event loop's thread of the supervisor.

    Args:
        running: gives the processes that there are.
    """

    def __init__(self, places: Sequence[ProcessPlace], running: Callable[[], list[Process]]) -> None:
        self._running = running
        self._several_engines = sum(place.kind == "engine" for place in places) > 1
        self._ended = Totals()
        self._collecting: dict[int, tuple[set[Process], asyncio.Event]] = {}
        self._number = 0
        for place in places:
            self.count_restarts(place, 0)

    def count_restarts(self, place: ProcessPlace, by: int) -> None:
        """The counter of a kind is there from the start, so that the first restart is an increase."""
        text = "Processes that ended by themselves or were killed, and were started again."
        self._ended.count("vernier_process_restarts", text, {"role": place.kind}, by)

    def take(self, process: Process, message: dict[str, Any]) -> None:
        """What a process has told."""
        process.families = message["families"]
        waiting, done = self._collecting.get(message["id"] or 0, (set(), None))
        waiting.discard(process)
        if done is not None and not waiting:
            done.set()

    def ended(self, process: Process) -> None:
        for waiting, done in self._collecting.values():
            waiting.discard(process)
            if not waiting:
                done.set()
        self._ended.add_ended(process.families)

    async def collect(self) -> Totals:
        self._number += 1
        asked = {p for p in self._running() if p.ready or p.place.kind == "engine"}
        done = asyncio.Event()
        number = self._number
        if asked:
            self._collecting[number] = asked, done
            for process in asked:
                process.control.send({"type": "collect", "id": number})
            try:
                async with asyncio.timeout(_COLLECT_S):
                    await done.wait()
            except TimeoutError:
                late = sorted(process.place.role for process in asked)
                logger.warning("figures are missing", extra={"roles": late})
            finally:
                del self._collecting[number]
        totals = Totals()
        totals.include(self._ended)
        for process in self._running():
            place = process.place
            device = str(place.number) if self._several_engines and place.kind == "engine" else None
            totals.add(place.role, process.families, device)
        return totals

    async def keep(self) -> None:
        """Collects for ever."""
        while True:
            await asyncio.sleep(_KEEP_S)
            await self.collect()

    def by_model(self) -> dict[str, dict[str, int]]:
        """Of the processes that have ended."""
        return self._ended.by_model()
