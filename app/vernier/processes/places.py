"""Where a process of the service belongs, whichever runs there now, and the memory that its end leaves behind."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from vernier.border.memory.arena import CHUNK_BYTES, create_memfd
from vernier.border.memory.room import BYTES as ROOM_BYTES
from vernier.exposition_merge import Family
from vernier.processes.control import Control

#: Of the memory that a front writes, and of that which an engine process writes for it. Pages are taken when used.
ARENA_BYTES = 32 * CHUNK_BYTES
#: Pauses before a process that died soon after its start is started again.
FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S, _STABLE_S = 10.0, 10.0
#: After one that had served, which is missed more and costs less to try.
_LONGEST_PAUSE_SERVED_S = 1.0

Kind = Literal["engine", "front"]


@dataclass(eq=False)
class Process:
    """A process that the supervisor has started.

    Attributes:
        place: where it belongs.
        families: the figures that it has told last.
    """

    place: ProcessPlace
    process: asyncio.subprocess.Process
    control: Control
    started: float
    heard: float
    ready: bool = False
    families: list[Family] = field(default_factory=list)


class ProcessPlace:
    """Where a front or an engine process belongs.

    Args:
        number: among those of its kind. settings: of its process.

    Attributes:
        memory: that its process alone writes: a front its requests, an engine process the room of its queues.
        running: None while there is no process.
        unloaded: names and versions of packages that were unloaded by hand from its engine process.
    """

    def __init__(self, kind: Kind, number: int, settings: dict[str, Any]) -> None:
        self.kind = kind
        self.number = number
        self.settings = settings
        self.memory = self._new_memory()
        self.running: Process | None = None
        self.unloaded: list[tuple[str, int]] = []
        self._pause_s = FIRST_PAUSE_S

    @property
    def role(self) -> str:
        return f"{self.kind}-{self.number}"

    def _new_memory(self) -> int:
        size = ARENA_BYTES if self.kind == "front" else ROOM_BYTES
        return create_memfd(f"{self.kind}-{self.number}", size)

    def renew(self) -> None:
        """Takes memory that nothing of the process before has. Raises OSError."""
        fresh = self._new_memory()
        os.close(self.memory)
        self.memory = fresh

    def pause_s(self, ended: Process, lived_s: float) -> float:
        """How long to wait before the next process is started."""
        if lived_s > _STABLE_S:
            self._pause_s = FIRST_PAUSE_S
            return 0.0
        longest_s = _LONGEST_PAUSE_S if not ended.ready else _LONGEST_PAUSE_SERVED_S
        pause_s = min(self._pause_s, longest_s)
        self._pause_s = min(2 * pause_s, longest_s)
        return pause_s

    def next_pause_s(self) -> float:
        """After a start that failed."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return pause_s
