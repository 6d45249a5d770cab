"""What a client may send and how long it may take: bounds of one connection, and of the bytes under way over all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from vernier.errors import Overloaded
from vernier.settings import Settings

#: Predictions of one connection that may be under way at once, and bytes of their bodies when there are several.
MAX_PIPELINED = 64
MAX_PIPELINED_BYTES = 4 * 2**20
#: Bodies up to this size are never refused for want of room, and not even counted when they come whole: the bounds
#: above and the queue's are enough for them.
UNCOUNTED_BYTES = 4096
#: What is read and thrown away after an answer that came before the end of its request, and for how long.
MAX_LINGER_BYTES = 256 * 1024
LINGER_S = 2.0
#: How long an idle connection stays open once the service stops, for a request that is on its way.
GRACE_S = 0.5

_DEFAULT_BYTES = 512 * 2**20
_SHARE = 4  # of the memory there is
_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Drain(Protocol):
    """Says when the service begins to shut down."""

    @property
    def draining(self) -> bool:
        """Whether clients should connect elsewhere: every answer then ends its connection."""
        ...


class ByteBudget:
    """Bytes that all connections of the process hold together: of requests without an answer, and of answers unread.

    Belongs to the event loop's thread. Announced lengths take nothing; what has arrived does.
    """

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def refusal(self, nbytes: int) -> Overloaded | None:
        """The error for a request that brings `nbytes` when there is no room for them."""
        if self.used + nbytes <= self.limit:
            return None
        return Overloaded(
            f"the service holds as many bytes of requests as it may ({self.limit}); send the request again soon, "
            f"in smaller parts, or raise VERNIER_MAX_INFLIGHT_BYTES on the service"
        )


class Releasable(Protocol):
    def release(self) -> None: ...


class Charge:
    """What one request, or one connection's unread answers, take of the budget; released with the request's permit."""

    __slots__ = ("_budget", "_permit", "nbytes")

    def __init__(self, budget: ByteBudget, permit: Releasable | None = None) -> None:
        self._budget = budget
        self._permit = permit
        self.nbytes = 0

    def grow(self, nbytes: int) -> Overloaded | None:
        """Counts `nbytes` that have arrived; the error, with nothing counted, when there is no room for them.

        There is always room for a small request: who sends large ones keeps out no others.
        """
        budget = self._budget
        if budget.used + nbytes > budget.limit and self.nbytes + nbytes > UNCOUNTED_BYTES:
            return budget.refusal(nbytes)
        budget.used += nbytes
        self.nbytes += nbytes
        return None

    def set(self, nbytes: int) -> None:
        """Counts what is there already, whether or not there is room."""
        self._budget.used += nbytes - self.nbytes
        self.nbytes = nbytes

    def release(self) -> None:
        """Idempotent."""
        self.set(0)
        permit, self._permit = self._permit, None
        if permit is not None:
            permit.release()


def byte_budget(
    settings: Settings, fronts: int = 1, memory_bytes: Callable[[], int] | None = None
) -> ByteBudget:
    """A front's share of what the settings say; by default of 512 MiB or a quarter of the memory.

    The share of several fronts holds the largest body all the same, if the whole does.
    """
    limit = settings.max_inflight_bytes
    if limit is None:
        share = (memory_bytes or available_memory)() // _SHARE
        limit = max(min(_DEFAULT_BYTES, share), settings.max_body_bytes)
    return ByteBudget(max(limit // fronts, min(limit, settings.max_body_bytes)))


def available_memory() -> int:
    """Bytes of memory of this machine, or of this process's control group if that has less."""
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for path in _GROUPS:
        try:
            known.append(int(path.read_text()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return min(known, default=_SHARE * _DEFAULT_BYTES)
