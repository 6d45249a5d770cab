"""Threads to look at, and what the kernel knows of them."""

from __future__ import annotations

import os
import threading

from vernier.serving.timeslice import set_time_slice, time_slice


class Idler(threading.Thread):
    """A thread that lives until `end`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._leave = threading.Event()
        self.start()

    def run(self) -> None:
        self._leave.wait(60)

    def end(self) -> None:
        self._leave.set()
        self.join()
        while os.path.exists(f"/proc/self/task/{self.id}"):
            pass  # the kernel's thread outlives Python's for a moment

    @property
    def id(self) -> int:
        assert self.native_id is not None
        return self.native_id

    @property
    def policy(self) -> int:
        return os.sched_getscheduler(self.id)

    @property
    def slice_s(self) -> float | None:
        return time_slice(self.id)


def _no_slices() -> bool:
    thread = Idler()
    try:
        return not set_time_slice(thread.id, 0.0123) or abs((thread.slice_s or 0.0) - 0.0123) > 1e-6
    finally:
        thread.end()


#: Whether this system lets no thread have a time slice of its own.
NO_SLICES = _no_slices()
