"""Memory that one process writes and another reads: a memfd each.

The owner alone allocates. Space is taken as bytes need it, by pages, so that the size of an arena is an upper bound and
no reservation; a named segment would meet the 64 MB that containers allow in /dev/shm, a memfd does not. An
allocation is free again when nothing in the owner's process refers to its array any more, so that no error path can
lose memory.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence

import numpy as np

from vernier.tensors import Array

#: Larger arrays get a memfd of their own.
MAX_BYTES = 4 * 2**20
CHUNK_BYTES = MAX_BYTES
#: Arrays begin at multiples of it: a cache line.
ALIGNMENT = 64
_PAGE = mmap.PAGESIZE


class ArenaFull(MemoryError):
    """Everything in the arena is in use."""


def create_memfd(name: str, size: int) -> int:
    """A file descriptor of `size` bytes of zeros in memory, which children inherit only when it is passed to them."""
    fd = os.memfd_create(f"vernier-{name}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def filled_memfd(name: str, *pieces: bytes | memoryview) -> int:
    """The same with these bytes, one after the other, in it."""
    fd = create_memfd(name, 0)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Chunk:
    __slots__ = ("array", "offset", "used")

    def __init__(self, array: Array, offset: int) -> None:
        self.array = array
        self.offset = offset
        self.used = 0

    @property
    def is_free(self) -> bool:
        return sys.getrefcount(self.array) == _ALONE


def _alone() -> int:
    chunk = _Chunk(np.empty(1, np.uint8), 0)
    return sys.getrefcount(chunk.array)


#: What `sys.getrefcount` tells of the array of a chunk that nobody else refers to.
_ALONE = _alone()


class Arena:
    """The owner's side. Belongs to one thread.

    Args:
        fd: of a memfd; stays the caller's.
        size: its bytes, a multiple of CHUNK_BYTES.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        view = memoryview(self._map)
        # An array for each chunk, over a view of its own: NumPy keeps it alive for as long as a slice of it lives.
        self._chunks = [
            _Chunk(np.frombuffer(view[at : at + CHUNK_BYTES], np.uint8), at)
            for at in range(0, size, CHUNK_BYTES)
        ]
        self._current = self._chunks[0]
        self._base = self._chunks[0].array.ctypes.data

    def take(self, nbytes: int) -> Array:
        """Writable bytes, free again when nothing refers to them. Raises ArenaFull; ValueError above MAX_BYTES."""
        return self.take_at(nbytes)[1]

    def take_at(self, nbytes: int) -> tuple[int, Array]:
        """The same, and where in the arena they begin."""
        if nbytes > MAX_BYTES:
            raise ValueError(f"{nbytes} bytes are more than a chunk holds")
        chunk = self._current
        start = chunk.used
        if start + nbytes > CHUNK_BYTES:
            chunk = self._current = self._next()
            start = 0
        chunk.used = start + -(-nbytes // ALIGNMENT) * ALIGNMENT
        return chunk.offset + start, chunk.array[start : start + nbytes]

    def region(self, nbytes: int) -> Array | None:
        """The first `nbytes` of a chunk of its own; None when none is free.

        It lies directly over a memoryview: arrays that are made over it refer to it, and not to what is beneath it, as
        NumPy has it where an array lies over an array. Its reference count tells whether it is in use.
        """
        chunk = next((c for c in self._chunks if c is not self._current and c.is_free), None)
        if chunk is None:
            return None
        chunk.used = CHUNK_BYTES
        return np.frombuffer(chunk.array.data[:nbytes], np.uint8)

    def _next(self) -> _Chunk:
        """A free chunk, always looked for from the front: what was used last is still in the caches."""
        for chunk in self._chunks:
            if chunk.is_free:
                chunk.used = 0
                return chunk
        raise ArenaFull("everything in the arena is in use")

    def offset_of(self, array: Array) -> int | None:
        """Where in the arena the bytes of an array in C order begin; None when they lie elsewhere."""
        offset: int = array.__array_interface__["data"][0] - self._base
        return offset if offset >= 0 and offset + array.nbytes <= self.size else None


class ArenaReader:
    """The other side: reads what the owner wrote."""

    def __init__(self, fd: int, size: int | None = None) -> None:
        size = os.fstat(fd).st_size if size is None else size
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)

    def array(self, offset: int, dtype: np.dtype[np.generic], shape: Sequence[int]) -> Array:
        """A read-only array over the arena; its base lives for as long as anything refers to its memory. Raises
        ValueError or OverflowError when it does not lie in there."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return np.empty(tuple(shape), dtype)
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)
