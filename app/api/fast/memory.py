"""Memory for large bodies that is used again and again, so that its pages are fresh only once.

A piece of memory is free exactly when nothing but the pool refers to it. Everything that shows its bytes, an array
made over a body or a slice of one, holds a reference to it, in whatever hands; so nobody has to give anything back,
and what somebody keeps (the precision monitor keeps inputs) is never written over.
"""

from __future__ import annotations

import sys

import numpy as np

from app.tensors import Array

#: Where a body begins, seen from an address that is a multiple of it: a cache line.
ALIGNMENT = 64
#: Sizes are rounded up to a multiple of this, so that bodies of nearly one size share memory.
_STEP = 64 * 1024


def _alone(held: list[Array]) -> int:
    return sys.getrefcount(held[0])


#: What `sys.getrefcount` tells of an entry of a list that nobody else refers to.
_ALONE = _alone([np.empty(1, np.uint8)])


class BodyMemory:
    """A pool of memory for one event loop's bodies; only its thread may call it.

    Args:
        most_bytes: kept for later at most. More can be in use; it goes back to the system afterwards.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: list[Array] = []
        self._starts: list[int] = []  # of each, where its first aligned address is
        self.kept_bytes = 0

    def take(self, before: int, size: int) -> memoryview:
        """Writable memory of `before + size` bytes, undefined ones; the last `size` begin at an aligned address.

        It is the caller's for as long as anything refers to it or to a view of it.
        """
        lead = -(-before // ALIGNMENT) * ALIGNMENT
        needed = lead + size + ALIGNMENT
        kept = self._kept
        for at in range(len(kept)):  # always in one order: what was used last is still in the cache
            if needed <= kept[at].nbytes <= 2 * needed and sys.getrefcount(kept[at]) == _ALONE:
                start = self._starts[at] + lead
                return kept[at].data[start - before : start + size]
        memory = np.empty(-(-needed // _STEP) * _STEP, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        self._keep(memory, start)
        start += lead
        return memory.data[start - before : start + size]

    def _keep(self, memory: Array, start: int) -> None:
        """Keeps it for later if there is room, in place of free memory of other sizes if need be."""
        kept = self._kept
        at = 0
        while self.kept_bytes + memory.nbytes > self._most_bytes and at < len(kept):
            if sys.getrefcount(kept[at]) == _ALONE:
                self.kept_bytes -= kept.pop(at).nbytes
                self._starts.pop(at)
            else:
                at += 1
        if self.kept_bytes + memory.nbytes <= self._most_bytes:
            kept.append(memory)
            self._starts.append(start)
            self.kept_bytes += memory.nbytes
