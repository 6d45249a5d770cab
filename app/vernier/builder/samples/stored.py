"""Arrays that lie in files and are read by rows when they are asked for.

Not mapped: a mapped file that another process truncates ends this process with SIGBUS, and one that is written to
gives other samples to every step. Read from a descriptor, both are an error with a sentence.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vernier.errors import DataChanged
from vernier.tensors import Array


class _OpenFile:
    """A descriptor that is closed with the last array that reads it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class StoredArray:
    """As much of an array's interface as samples need: shape, dtype, and rows by slice or by indices.

    Args:
        offset: where the values begin in the file, in C order.

    Raises:
        DataChanged: on reading, when the file is no longer what it was when it was opened.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> None:
        self.path, self.dtype, self.shape = path, dtype, shape
        self._offset = offset
        self._file = _OpenFile(path)
        self._opened_as = self._state()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Array) -> Array:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._rows(start, max(start, stop))
            index = np.arange(start, stop, step)
        rows = np.asarray(index, np.int64)
        if not len(rows):
            return self._rows(0, 0)
        # Neighbours are read at once.
        ends = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        return np.concatenate([self._rows(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(ends)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def grouped(self, rows: int, count: int) -> StoredArray:
        """[count, rows, …]: `rows` rows to an element; rows left over are dropped."""
        other = object.__new__(StoredArray)
        other.__dict__ = {**self.__dict__, "shape": (count, rows, *self.shape[1:])}
        return other

    def _rows(self, start: int, stop: int) -> Array:
        found = np.empty((stop - start, *self.shape[1:]), self.dtype)
        row_bytes = found.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        view = memoryview(found.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        at = self._offset + start * row_bytes
        while len(view):
            got = os.preadv(self._file.descriptor, [view], at)
            if got == 0:
                raise self._changed("it is shorter than it was")
            view, at = view[got:], at + got
        if self._state() != self._opened_as:
            raise self._changed("it was written to")
        return found

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.descriptor)
        return status.st_size, status.st_mtime_ns

    def _changed(self, how: str) -> DataChanged:
        return DataChanged(
            f"{self.path} changed while the build read it ({how}), so nothing was published: build again when "
            f"the file is complete, and leave it alone meanwhile"
        )
