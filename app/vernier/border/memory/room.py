"""How much room each model's queue has, where every front can read it: so that a front refuses without reading inputs.

The engine process alone writes the page, 8 bytes at a time. What a front reads may be a moment old; the engine process
has the last word.
"""

from __future__ import annotations

import mmap

MODELS = 1024
BYTES = 16 * MODELS
_LONGEST_S = 1e9
#: What stands there before anything is known.
_UNKNOWN = 2**62


class RoomPage:
    """
    Args:
        fd: of a memfd of BYTES bytes; stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, BYTES)
        self._rows = memoryview(self._map)[: BYTES // 2].cast("q")
        self._retry_us = memoryview(self._map)[BYTES // 2 :].cast("q")

    def publish(self, model: int, rows: int, retry_after_s: float) -> None:
        """
        Args:
            rows: that may still be queued. retry_after_s: after which a refused request should come back.
        """
        self._retry_us[model % MODELS] = int(1e6 * min(retry_after_s, _LONGEST_S))
        self._rows[model % MODELS] = rows - _UNKNOWN  # a page of zeros tells of room without end

    def rows(self, model: int) -> int:
        """Rows that may still be queued."""
        return self._rows[model % MODELS] + _UNKNOWN

    def retry_after_s(self, model: int) -> float:
        return self._retry_us[model % MODELS] / 1e6
