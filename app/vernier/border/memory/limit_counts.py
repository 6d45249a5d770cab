"""How much each client uses of its limits, summed over all fronts.

Each front writes its own columns, 8 bytes at a time, and reads those of the others; nobody else writes them. So a limit
holds over all fronts, but for requests that several fronts admit within the same microseconds.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import numpy as np

#: A second of requests is counted in so many steps, so a client may send a sixteenth less than its limit, never more.
STEPS = 16
_RING = 2 * STEPS
#: A slot of the ring: the requests in the lower 24 bits, above them the step: below 2^39 for a thousand years.
_BITS = 24
_MASK = 2**_BITS - 1


def bytes_for(clients: int, fronts: int) -> int:
    return max(1, clients) * fronts * 8 * (1 + _RING)


class SharedCounts:
    """One front's view. Belongs to its event loop's thread.

    Args:
        fd: of a memfd of `bytes_for` bytes; stays the caller's.
        clients: client → its number, the same in all fronts.
    """

    def __init__(self, fd: int, clients: Mapping[str, int], fronts: int, front: int) -> None:
        self._map = mmap.mmap(fd, bytes_for(len(clients), fronts))
        self._table = np.frombuffer(self._map, np.int64).reshape(-1, fronts, 1 + _RING)
        self._clients = clients
        self._front = front

    def running(self, client: str) -> int:
        """Requests that run now, in all fronts."""
        return int(self._table[self._clients[client], :, 0].sum())

    def begin(self, client: str) -> None:
        self._table[self._clients[client], self._front, 0] += 1

    def end(self, client: str) -> None:
        self._table[self._clients[client], self._front, 0] -= 1

    def spend(self, client: str, limit: int, now: float) -> bool:
        """Counts a request, unless as many as the limit were counted within the last second.

        Args:
            now: seconds of CLOCK_MONOTONIC, which all processes share.
        """
        step = int(now * STEPS)
        ring = self._table[self._clients[client], :, 1:]
        recent = ring[(ring >> _BITS) >= step - STEPS]
        if int((recent & _MASK).sum()) >= limit:
            return False
        own, slot = ring[self._front], step % _RING
        count = int(own[slot]) & _MASK if int(own[slot]) >> _BITS == step else 0
        own[slot] = (step << _BITS) | (count + 1)
        return True


def forget_front(fd: int, clients: int, fronts: int, front: int) -> None:
    """A front has died: nothing of it runs any more."""
    with mmap.mmap(fd, bytes_for(clients, fronts)) as memory:
        table = np.frombuffer(memory, np.int64).reshape(-1, fronts, 1 + _RING)
        table[:, front, 0] = 0
        del table
