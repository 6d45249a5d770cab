"""Puts arrays where the other process can read them, and reads what the other process has put somewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vernier.border.arena import MAX_BYTES, Arena, ArenaFull, ArenaReader, create_memfd
from vernier.border.wire import Place, Tensor
from vernier.tensors import Array


class Placed:
    """Arrays that the other process can read.

    Attributes:
        places: of each.
        fds: to be sent along, for those that have memory of their own.
        kept: must be referred to for as long as the other process may read.
    """

    __slots__ = ("fds", "kept", "places")

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.fds: list[int] = []
        self.kept: list[Any] = []


def place(arrays: Iterable[Array], arena: Arena) -> Placed:
    """Copies arrays into the arena that do not lie there already; large ones, and all when it is full, into memory of
    their own. Raises OSError or MemoryError when there is none."""
    placed = Placed()
    try:
        for array in arrays:
            _place(array, arena, placed)
    except BaseException:
        for fd in placed.fds:
            os.close(fd)
        raise
    return placed


def _place(array: Array, arena: Arena, placed: Placed) -> None:
    contiguous = array.flags.c_contiguous
    if contiguous:
        offset = arena.offset_of(array)
        if offset is not None:
            placed.places.append(Place(0, offset))
            placed.kept.append(array)
            return
    nbytes = array.nbytes
    if nbytes <= MAX_BYTES:
        try:
            memory = arena.take(nbytes)
        except ArenaFull:
            pass
        else:
            target: Array = memory.view(array.dtype).reshape(array.shape)
            target[...] = array
            offset = arena.offset_of(memory)
            assert offset is not None
            placed.places.append(Place(0, offset))
            placed.kept.append(memory)
            return
    placed.fds.append(_own_memory(array, nbytes))
    placed.places.append(Place(len(placed.fds), 0))


def _own_memory(array: Array, nbytes: int) -> int:
    fd = create_memfd("tensor", nbytes)
    try:
        view = np.ascontiguousarray(array).data.cast("B")
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


class PlacedReader:
    """Reads arrays of one record."""

    def __init__(self, arena: ArenaReader, fds: Sequence[int]) -> None:
        self._arena = arena
        self._fds = fds

    def read(self, tensor: Tensor) -> Array:
        """A read-only array. Raises ValueError or IndexError when it does not lie where it should."""
        memory, offset = tensor.place
        if memory == 0:
            return self._arena.array(offset, tensor.dtype, tensor.shape)
        return ArenaReader(self._fds[memory - 1]).array(offset, tensor.dtype, tensor.shape)
