"""What a front reads of an engine process's answers, and which of them nothing refers to any more.

Who gets an answer may read it whenever they like, or hand it on. Its memory may be used again when the last array,
slice or buffer over it has gone, in whichever thread; only then is the engine process told.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from vernier.border.memory.arena import ArenaReader
from vernier.border.memory.placement import PlacedReader
from vernier.border.records import wire
from vernier.tensors import Arrays

#: Answers that nothing refers to any more before the engine process hears of it, where nothing else is sent.
_MANY = 64
_SOON_S = 0.05


class _Root(weakref.ref[Any]):
    """Of an array directly over the arena.

    Attributes:
        answer: number of the answer that it is a part of.
    """

    __slots__ = ("answer",)
    answer: int


class AnswerMemory:
    """Of one engine process. Belongs to the event loop's thread; arrays may be let go in any.

    Args:
        fd: of the memory that the engine process writes; stays the caller's.
        write: sends a record to the engine process.
    """

    def __init__(self, fd: int, write: Callable[[bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = ArenaReader(fd)
        self._write = write
        self._roots: dict[int, list[_Root]] = {}
        self._gone: deque[_Root] = deque()  # the only thing that other threads touch
        self._free: list[int] = []
        self._timer: asyncio.TimerHandle | None = None

    def read(self, names: Sequence[str], answered: wire.Answered, fds: Sequence[int]) -> Arrays:
        """The outputs of an answer. Raises WireError."""
        reader = PlacedReader(self._reader, fds)
        arrays = wire.arrays_of(names, answered.tensors, reader.read)
        number, gone, roots = answered.answer, self._gone.append, reader.roots
        if not roots:
            self._free.append(number)
            return arrays
        made = self._roots[number] = [_Root(root, gone) for root in roots]
        for root in made:
            root.answer = number
        return arrays

    def skip(self, answered: wire.Answered) -> None:
        """Nothing of an answer is handed on."""
        if answered.answer not in self._roots:
            self._free.append(answered.answer)

    def acknowledge(self) -> None:
        """Tells which answers nothing refers to any more."""
        if self._gone or self._free:
            free = self._take_free()
            for start in range(0, len(free), wire.MAX_REQUESTS):
                self._write(wire.write_consumed(free[start : start + wire.MAX_REQUESTS]))

    def _take_free(self) -> list[int]:
        gone, roots = self._gone, self._roots
        while gone:
            answer = gone.popleft().answer
            if answer in roots and all(root() is None for root in roots[answer]):
                del roots[answer]
                self._free.append(answer)
        free, self._free = self._free, []
        return free

    def acknowledge_soon(self) -> None:
        """The same, once many have gone or a while has passed; and again for as long as answers are referred to."""
        if len(self._gone) + len(self._free) >= _MANY:
            self.acknowledge()
        elif self._timer is None:
            self._timer = self._loop.call_later(_SOON_S, self._acknowledge_late)

    def _acknowledge_late(self) -> None:
        self._timer = None
        self.acknowledge()
        if self._roots:
            self._timer = self._loop.call_later(_SOON_S, self._acknowledge_late)

    def close(self) -> None:
        """The engine process has gone; what is referred to can still be read."""
        if self._timer is not None:
            self._timer.cancel()
