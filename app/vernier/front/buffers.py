"""Memory for large bodies that is used again and again, so that its pages are fresh only once.

It comes in slabs. Bodies of one size that arrive one after the other lie in a slab without a gap, so that they are
a batch without being copied. A head arrives in front of its body, in one read; so a slab is filled from its end
towards its beginning, and a head lies where the next body will be, and is read before that comes.

A slab is free exactly when nothing but the pool refers to it. Everything that shows its bytes, an array made over a
body or a slice of one, holds a reference to it, in whatever hands; so nobody has to give anything back, and what
somebody keeps is never written over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from vernier.border.memory.arena import CHUNK_BYTES, Arena
from vernier.tensors import Array

#: Where the first body of a slab begins, seen from an address that is a multiple of it: a cache line.
ALIGNMENT = 64
#: Bytes of a slab for several bodies, at most: from 4 MiB on NumPy asks for huge pages, and the first byte takes 2 MiB;
#: and a slab that is full should still be in the cache when it is read.
_SLAB_BYTES = 4 * 2**20 - 2**16
#: Sizes are rounded up to a multiple of this, so that bodies of nearly one size share memory.
_STEP = 64 * 1024
#: BufferSlice for what arrives before a body, at most.
MOST_BEFORE = 4096
#: Sizes of which a slab may be open.
_MOST_OPEN = 8


class _Slab:
    """Memory for bodies of `size` bytes, of which those numbered `left` and above are handed out."""

    __slots__ = ("array", "first", "left", "size")

    def __init__(self, array: Array) -> None:
        self.array = array
        self.size = self.left = self.first = 0

    @property
    def is_free(self) -> bool:
        return sys.getrefcount(self.array) == _ALONE

    def divide(self, size: int, several: bool) -> None:
        """Begins anew, for bodies of this size."""
        self.first = MOST_BEFORE + -(self.array.ctypes.data + MOST_BEFORE) % ALIGNMENT
        self.size = size
        self.left = (self.array.nbytes - self.first) // size if several else 1


def _alone() -> int:
    slab = _Slab(np.empty(1, np.uint8))
    return sys.getrefcount(slab.array)


#: What `sys.getrefcount` tells of the array of a slab that nobody else refers to.
_ALONE = _alone()


class BufferSlice:
    """Where one body lies.

    Attributes:
        view: writable: what arrives before the body, and the body.
        is_last: whether there is no room for another one below it.
    """

    __slots__ = ("_at", "_slab", "is_last", "view")

    def __init__(self, slab: _Slab, at: int, before: int) -> None:
        self._slab = slab
        self._at = at
        self.is_last = at == 0
        start = slab.first + at * slab.size
        self.view = slab.array.data[start - before : start + slab.size]

    def is_above(self, other: BufferSlice) -> bool:
        """Whether this body begins where the other ends."""
        return self._slab is other._slab and self._at == other._at + 1


def neighbours(rooms: Sequence[BufferSlice]) -> memoryview:
    """The bodies of rooms as one, read-only; each must be above the one before it."""
    slab, lowest = rooms[0]._slab, rooms[0]._at
    start = slab.first + lowest * slab.size
    return slab.array.data[start : start + len(rooms) * slab.size].toreadonly()


class BodyBufferPool:
    """A pool of memory for one event loop's bodies; only its thread may call it.

    Args:
        most_bytes: kept for later at most. More can be in use; it goes back to the system afterwards.
        arena: whose memory is kept; None for memory of this process alone.
    """

    def __init__(self, most_bytes: int, arena: Arena | None = None) -> None:
        self._most_bytes = most_bytes
        self._arena = arena
        self._kept: list[_Slab] = []
        self._open: dict[int, _Slab] = {}  # by the size of bodies: has room for more of them
        self.kept_bytes = 0
        #: For reads of which nothing need be kept.
        self.scratch = memoryview(bytearray(4096))

    def take(self, before: int, size: int, *, several: bool = True) -> BufferSlice:
        """BufferSlice for `before + size` undefined bytes. What stands in the first `before` of them must be used up
        before the next call: they may lie in the room that it gives.

        Args:
            before: at most MOST_BEFORE, and shorter than a body.
            several: whether more bodies of this size will come, and should lie beside it.
        """
        slab = self._open.get(size) if several else None
        if slab is None:
            slab = self._divided(size, several)
        elif slab.is_free:
            slab.divide(size, several=True)  # what was used last is still in the cache
        slab.left = at = slab.left - 1
        if at:
            self._open[size] = slab
        else:
            self._close(slab)
        return BufferSlice(slab, at, before)

    def _divided(self, size: int, several: bool) -> _Slab:
        """A free slab for bodies of this size, or a new one."""
        one = MOST_BEFORE + ALIGNMENT + size
        wanted = one + size * ((_SLAB_BYTES - one) // size) if several and one < _SLAB_BYTES else one
        for slab in self._kept:  # always in one order: what was used last is still in the cache
            if wanted <= slab.array.nbytes <= 2 * wanted and slab.is_free:
                self._close(slab)
                slab.divide(size, several)
                return slab
        if len(self._open) >= _MOST_OPEN:
            self._open.clear()
        kept = self._keep(wanted)
        slab = kept or _Slab(_empty(one))
        slab.divide(size, several and kept is not None)  # who holds on to one that is not kept holds no more
        return slab

    def _close(self, slab: _Slab) -> None:
        if self._open.get(slab.size) is slab:
            del self._open[slab.size]

    def _keep(self, wanted: int) -> _Slab | None:
        """A new slab to be kept, in place of free ones of other sizes if need be; None if there is no room."""
        nbytes = -(-wanted // _STEP) * _STEP
        kept = self._kept
        at = 0
        while self.kept_bytes + nbytes > self._most_bytes and at < len(kept):
            if kept[at].is_free:
                gone = kept.pop(at)
                self.kept_bytes -= gone.array.nbytes
                self._close(gone)
            else:
                at += 1
        if self.kept_bytes + nbytes > self._most_bytes:
            return None
        slab = _Slab(self._memory(nbytes))
        kept.append(slab)
        self.kept_bytes += nbytes
        return slab

    def _memory(self, nbytes: int) -> Array:
        """Undefined bytes: of the arena, where there are as many in one piece."""
        region = None
        if self._arena is not None and nbytes <= CHUNK_BYTES:
            region = self._arena.region(nbytes)
        return _empty(nbytes) if region is None else region


def _empty(nbytes: int) -> Array:
    return np.empty(nbytes, np.uint8)
