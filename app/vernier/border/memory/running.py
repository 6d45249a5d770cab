"""Which batches the engine process is running, in memory that outlives it.

A page for each front holds the numbers of that front's batches which have begun and not ended. The engine process
alone writes it, 8 bytes at a time; the front reads it after the engine process has died.
"""

from __future__ import annotations

import mmap

#: More than requests of one front that can run at a time; what has no slot is not suspected.
SLOTS = 4096
BYTES = 8 * SLOTS


class RunningBatches:
    """
    Args:
        fd: of a memfd of BYTES bytes; stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, BYTES)
        self._slots = memoryview(self._map).cast("Q")
        self._free = list(range(SLOTS))
        self._place: dict[int, int] = {}

    def begin(self, number: int) -> None:
        """The batch with this number, above 0, may be what kills the process from now on."""
        if number not in self._place and self._free:
            self._place[number] = place = self._free.pop()
            self._slots[place] = number

    def end(self, number: int) -> None:
        place = self._place.pop(number, None)
        if place is not None:
            self._slots[place] = 0
            self._free.append(place)

    def numbers(self) -> set[int]:
        """Of the batches that are running."""
        return set(self._slots) - {0}
