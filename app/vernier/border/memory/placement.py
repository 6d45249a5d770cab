"""Puts arrays where the other process can read them, and reads what the other process has put somewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vernier.border.memory.arena import ALIGNMENT, MAX_BYTES, Arena, ArenaFull, ArenaReader, filled_memfd
from vernier.border.records.wire import ArrayPlace, Tensor
from vernier.tensors import Array


class Placed:
    """Arrays that the other process can read.

    Attributes:
        places: of each.
        fds: to be sent along: of the memory of those that do not lie in the arena, which have one together.
        kept: must be referred to for as long as the other process may read.
    """

    __slots__ = ("_pieces", "_size", "fds", "kept", "places")

    def __init__(self) -> None:
        self.places: list[ArrayPlace] = []
        self.fds: list[int] = []
        self.kept: list[Any] = []
        self._pieces: list[bytes | memoryview] = []
        self._size = 0

    def add(self, array: Array, arena: Arena, may_lie_there: bool) -> None:
        if may_lie_there and array.flags.c_contiguous:
            known = arena.offset_of(array)
            if known is not None:
                self.places.append(ArrayPlace(0, known))
                self.kept.append(array)
                return
        nbytes = array.nbytes
        if nbytes <= MAX_BYTES:
            try:
                offset, memory = arena.take_at(nbytes)
            except ArenaFull:
                pass
            else:
                target: Array = memory.view(array.dtype).reshape(array.shape)
                target[...] = array
                self.places.append(ArrayPlace(0, offset))
                self.kept.append(memory)
                return
        gap = -self._size % ALIGNMENT
        self._pieces += (bytes(gap), np.ascontiguousarray(array).data.cast("B"))
        self.places.append(ArrayPlace(1, self._size + gap))
        self._size += gap + nbytes

    def end(self) -> None:
        if self._pieces:
            self.fds.append(filled_memfd("tensors", *self._pieces))
            self._pieces = []


def place(arrays: Iterable[Array], arena: Arena, may_lie_there: bool = True) -> Placed:
    """Copies arrays into the arena that do not lie there already; large ones, and all when it is full, into memory of
    their own. Raises OSError or MemoryError when there is none.

    Args:
        may_lie_there: False where no array lies in the arena, which saves looking.
    """
    placed = Placed()
    for array in arrays:
        placed.add(array, arena, may_lie_there)
    placed.end()
    return placed


class PlacedReader:
    """Reads arrays of one record.

    Attributes:
        roots: in the arena: each lives for as long as anything refers to the memory of an array that was read.
    """

    def __init__(self, arena: ArenaReader, fds: Sequence[int]) -> None:
        self._arena = arena
        self._fds = fds
        self._memories: dict[int, ArenaReader] | None = None
        self.roots: list[Any] = []

    def read(self, tensor: Tensor) -> Array:
        """A read-only array. Raises ValueError, IndexError or OSError when it does not lie where it should."""
        memory, offset = tensor.place
        if memory == 0:
            array = self._arena.array(offset, tensor.dtype, tensor.shape)
            if array.base is not None:
                self.roots.append(array.base)
            return array
        if self._memories is None:
            self._memories = {}
        if memory not in self._memories:
            self._memories[memory] = ArenaReader(self._fds[memory - 1])
        return self._memories[memory].array(offset, tensor.dtype, tensor.shape)
