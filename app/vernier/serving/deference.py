"""While requests are refused, the event loop's thread lets the computing threads finish their time slices.

On a core that also computes, every arrival wakes the loop, which interrupts a worker, finds the caches cold and
leaves them cold; under overload most of them are arrivals that will be refused. So for that time the loop's thread
is a batch thread (sched(7): woken, it does not preempt) and reads what came meanwhile in one turn, and all threads
have longer slices, as long as the latency objectives can bear. Where a core is idle nobody waits for anything, and when
the last batch ends the core is free, so that answers do not wait either.

Threads inherit how their creator is scheduled, and the kernel's SCHED_RESET_ON_FORK does not stop that for batch
threads (and can be taken back by privileged processes only). So those that began meanwhile, whoever made them, are
made ordinary again: within a moment, and at the end for certain. Slices are inherited too, and end with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import suppress

from vernier.serving.timeslice import set_time_slice, time_slice

logger = logging.getLogger(__name__)

#: After the last refusal. Each change is a call of the system.
_LINGER_S = 0.05
#: A slice ends with a tick of the kernel's clock (at 250 Hz).
_TICK_S = 0.004
#: The longest slice: beyond it a turn of the loop does not become cheaper.
_SLICE_S = 0.010
#: The share of the shortest latency objective that a slice may take: what waits for it to end has that much less time.
_SHARE = 0.2
#: The threads of this process (proc(5)).
_TASKS = "/proc/self/task"


class Deference:
    """Belongs to the event loop's thread, and changes how that thread is scheduled.

    Attributes:
        active: whether it defers now.
    """

    def __init__(self) -> None:
        self.active = False
        self._possible = hasattr(os, "SCHED_BATCH") and os.path.isdir(_TASKS)
        self._refused = False  # since the timer was set
        self._in_turn = False
        self._before = self._last = 0.0
        self._chosen: set[int] = set()  # threads that were batch threads before
        self._objectives: dict[object, float] = {}
        self._slices: dict[int, float] = {}  # of threads before they were made longer
        self._longest_wait_s = _TICK_S

    def join(self, owner: object, objective_s: float | None) -> None:
        """A model is served, perhaps with a latency objective."""
        if objective_s is not None:
            self._objectives[owner] = objective_s

    def leave(self, owner: object) -> None:
        """It is not any more. Does nothing when it did not join."""
        self._objectives.pop(owner, None)

    def refused(self, now: float) -> None:
        """Requests were refused while workers compute."""
        self._refused = True
        if self.active or not self._possible:
            return
        self._chosen = set(_batch_threads())
        if os.sched_getscheduler(0) != os.SCHED_OTHER or not self._schedule(os.SCHED_BATCH):
            self._possible = False  # somebody chose how this thread is scheduled, or forbade to choose
            return
        self.active = True
        self._lengthen()
        self._before = self._last = now
        self._watch()

    def earliest(self, now: float) -> float:
        """When the requests that are looked at now may have arrived: after the last turn of the loop began."""
        if not self.active:
            return now
        if not self._in_turn:
            self._in_turn = True
            self._before, self._last = self._last, now
            asyncio.get_running_loop().call_soon(self._end_turn)
        return max(self._before, now - self._longest_wait_s)

    def _end_turn(self) -> None:
        self._in_turn = False

    def _watch(self) -> None:
        self._refused = False
        asyncio.get_running_loop().call_later(_LINGER_S, self._look)

    def _look(self) -> None:
        if self._refused:
            self._release({*self._chosen, threading.get_native_id()})
            self._watch()
        else:
            self.active = False
            self._schedule(os.SCHED_OTHER)
            while self._release(self._chosen):
                pass  # one of them may have made another before it was its turn
            self._shorten()

    def _lengthen(self) -> None:
        """Gives every thread a longer slice: as long as one on a core has a shorter one, that is when others run."""
        seconds = min([_SLICE_S, *(_SHARE * objective for objective in self._objectives.values())])
        self._longest_wait_s = _TICK_S
        if seconds <= _TICK_S:  # they are that long anyhow
            return
        self._longest_wait_s += seconds
        for thread in _threads():
            before = time_slice(thread)
            if before is not None and set_time_slice(thread, seconds):
                self._slices[thread] = before

    def _shorten(self) -> None:
        """Undoes `_lengthen`; for threads that began meanwhile too."""
        if not self._slices:
            return
        before, self._slices = self._slices, {}
        usual = before.get(threading.get_native_id(), 0.0)
        for thread in _threads():
            set_time_slice(thread, before.get(thread, usual))

    def _release(self, but: set[int]) -> bool:
        """Makes batch threads ordinary, all `but` some; whether there were any."""
        found = [thread for thread in _batch_threads() if thread not in but]
        for thread in found:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        return bool(found)

    def _schedule(self, policy: int) -> bool:
        try:
            os.sched_setscheduler(0, policy, os.sched_param(0))
        except OSError as error:
            logger.warning(
                "the loop's thread cannot change how it is scheduled",
                extra={"thread": threading.current_thread().name, "error": str(error)},
            )
            return False
        return True


def _batch_threads() -> list[int]:
    """Those of this process."""
    found = []
    for thread in _threads():
        with suppress(ProcessLookupError):
            if os.sched_getscheduler(thread) == os.SCHED_BATCH:
                found.append(thread)
    return found


def _threads() -> list[int]:
    """All of this process."""
    return list(map(int, os.listdir(_TASKS)))
