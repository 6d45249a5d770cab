"""One thread that owns one slot for each variant, and runs what it is given, in order.

A slot is opened, used and closed by the same thread; on a GPU the thread also holds the device's context
while it lives. The worker knows nothing of batches: a job is any callable that takes the open slots.
A job reports to its giver itself; the worker reports only its own start and end.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import Callable, Dict, Iterable, Optional

from vernier.engine.base import Executor, Slot

logger = logging.getLogger(__name__)

OpenSlots = Dict[str, Slot]
Job = Callable[[OpenSlots], None]


class Worker:
    """Starts at once.

    Args:
        name: of the thread.
        executors: each gives one slot, keyed by its precision.
        on_open: called on the worker's thread once every slot is open.
        on_exit: called on the worker's thread as its last act, with the error that killed it or None
            after `close`. Jobs that were waiting are not run; their givers know them.

    Attributes:
        alive: False from the moment the thread stops taking jobs.
    """

    def __init__(
        self,
        name: str,
        executors: Iterable[Executor],
        on_open: Callable[["Worker", OpenSlots], None],
        on_exit: Callable[["Worker", Optional[BaseException]], None],
    ) -> None:
        self.alive = True
        self._executors = list(executors)
        self._on_open = on_open
        self._on_exit = on_exit
        self._jobs: SimpleQueue[Optional[Job]] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Runs `job` after those before it. An exception that leaves the job kills the worker."""
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the thread after the jobs already given. Does not wait; see `join`."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread to end; True when it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        slots: OpenSlots = {}
        death: Optional[BaseException] = None
        try:
            for executor in self._executors:
                slots[executor.precision] = executor.open_slot()
            self._executors.clear()
            self._on_open(self, slots)
            while True:
                job = self._jobs.get()
                if job is None:
                    break
                job(slots)
                del job  # what it holds, such as a request's arrays, must not outlive it here
        except BaseException as error:
            death = error
        self.alive = False
        for slot in slots.values():
            _close_quietly(slot)
        self._on_exit(self, death)


# --- jobs that change what a worker owns ----------------------------------------------------------
def open_slot(executor: Executor, slots: OpenSlots) -> Slot:
    """Opens a slot on the worker's thread, and leaves the worker's own as they are."""
    return executor.open_slot()


def close_slot(slot: Slot, slots: OpenSlots) -> None:
    """Closes a slot that `open_slot` opened."""
    slot.close()


def swap_slot(precision: str, slot: Slot, slots: OpenSlots) -> None:
    """Gives the worker this slot for a variant, and closes the one that it had."""
    old = slots.get(precision)
    slots[precision] = slot
    if old is not None:
        old.close()


def replace_slot(precision: str, executor: Executor, slots: OpenSlots) -> None:
    """Opens a slot and swaps it in."""
    swap_slot(precision, executor.open_slot(), slots)


def _close_quietly(slot: Slot) -> None:
    """A slot that cannot be closed must not keep the end of its worker from being reported."""
    try:
        slot.close()
    except Exception as error:
        logger.error("a slot could not be closed", extra={"error": repr(error)})
