"""Where the tensors of one batch lie inside a block of bytes: packed, aligned, copied in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Sequence, Tuple

import numpy as np

from vernier.tensors import Array, Arrays

ALIGNMENT = 256


@dataclass(frozen=True)
class Layout:
    """Tensors one behind the other.

    Attributes:
        names, dtypes, shapes: of each tensor, in order; dtypes are NumPy's.
        offsets: of each tensor's first byte, a multiple of the alignment.
        size: bytes from the first tensor's first to the last tensor's last.
    """

    names: Tuple[str, ...]
    dtypes: Tuple[np.dtype, ...]
    shapes: Tuple[Tuple[int, ...], ...]
    offsets: Tuple[int, ...]
    size: int

    def views(self, block: Array) -> Arrays:
        """Arrays over `block`, a one-dimensional uint8 array of at least `size` bytes."""
        return {
            name: np.ndarray(shape, dtype, buffer=block, offset=offset)
            for name, dtype, shape, offset in zip(self.names, self.dtypes, self.shapes, self.offsets)
        }

    def addresses(self, base: int) -> List[Tuple[str, int]]:
        return [(name, base + offset) for name, offset in zip(self.names, self.offsets)]


def pack(
    names: Sequence[str],
    dtypes: Mapping[str, np.dtype],
    shapes: Mapping[str, Tuple[int, ...]],
) -> Layout:
    """Lays the tensors out in the order of `names`."""
    offsets: List[int] = []
    end = 0
    for name in names:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + tensor_bytes(dtypes[name], shapes[name])
    return Layout(
        tuple(names),
        tuple(dtypes[name] for name in names),
        tuple(shapes[name] for name in names),
        tuple(offsets),
        end,
    )


def tensor_bytes(dtype: np.dtype, shape: Sequence[int]) -> int:
    """Bytes of one dense tensor."""
    size = dtype.itemsize
    for length in shape:
        size *= int(length)
    return size
