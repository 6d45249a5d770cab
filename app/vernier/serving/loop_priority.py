"""While requests are refused, the event loop's thread does not interrupt the threads that compute.

On a core that also computes, each arrival wakes the loop, which preempts a worker and leaves the caches cold; under
overload most of the arrivals will be refused. A batch thread (sched(7)) does not preempt when it is woken, so it lets
the worker finish its time slice and reads what has come meanwhile in one turn. Where a core is idle nothing waits.
"""

from __future__ import annotations

import asyncio
import os

#: After the last refusal. Each change is a system call.
_LINGER_S = 0.05
_ORDINARY, _BATCH = 0, 3  # SCHED_OTHER and SCHED_BATCH, which only Linux has


class LoopPriority:
    """Belongs to the event loop's thread, and changes how that thread is scheduled.

    Attributes:
        lowered: whether it is a batch thread now.
    """

    def __init__(self) -> None:
        self.lowered = False
        self._refused = False  # since the timer was set
        self._timer: asyncio.TimerHandle | None = None

    def refused(self) -> None:
        """Requests were refused while workers compute."""
        self._refused = True
        if not self.lowered and _change(0, _ORDINARY, _BATCH):
            self.lowered = True
            self._look()

    def _look(self) -> None:
        if not self._refused:
            self.restore()
            return
        self._refused = False
        self._timer = asyncio.get_running_loop().call_later(_LINGER_S, self._look)

    def restore(self) -> None:
        """Makes the thread ordinary again, and those that were started meanwhile, since they inherit it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.lowered:
            self.lowered = False
            for thread in os.listdir("/proc/self/task"):
                _change(int(thread), _BATCH, _ORDINARY)


def _change(thread: int, before: int, after: int) -> bool:
    """Gives a thread (0: this one) another scheduling policy; not where the system cannot or the operator chose one."""
    try:
        if os.sched_getscheduler(thread) != before:
            return False
        os.sched_setscheduler(thread, after, os.sched_param(0))
    except (AttributeError, OSError):  # no Linux; forbidden, or the thread has ended
        return False
    return True
