"""The workers of one model version, seen from the event loop's thread: who is idle, who died, who replaces whom.

A worker posts to the loop once for each batch. When one dies, the batch it held is reported lost, once, the
fault shows in readiness until its replacement has opened its slots, and a worker that keeps dying
is given up. After several failed executions in a row a synthetic one asks whether the engine or the
requests are to blame; while the engine is, readiness says so, and the probe is repeated until it succeeds.

Where the executors span several devices each worker keeps to one, its place. A device that fails takes its
workers with it; readiness turns red for good, and the other devices still answer what comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from vernier.engine.base import Executor
from vernier.engine.pool import Slots, Worker, close_slot, open_slot, replace_slot, swap_slot
from vernier.errors import DeviceFailed, EngineError, VernierError
from vernier.serving.calls import Calls
from vernier.serving.execution import Execution

logger = logging.getLogger(__name__)

#: Deaths in a row, with no batch finished in between, after which a worker is not replaced any more.
MOST_DEATHS = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 30.0
#: Failed executions in a row that raise the question whether the engine still works.
_SUSPICIOUS_FAILURES = 3

Curves = dict[str, dict[int, float]]


class Listener(Protocol):
    """Who is told; on the event loop's thread."""

    def worker_idle(self) -> None:
        """There is an idle worker that was not there before."""

    def execution_finished(self, execution: Execution) -> None:
        """It has outputs or an error, and its worker is idle again."""

    def execution_lost(self, execution: Execution, error: EngineError) -> None:
        """The worker died while it ran this."""

    def device_lost(self, error: EngineError) -> None:
        """Nothing can run any more until the process restarts."""


class Crew:
    """Belongs to the event loop's thread.

    Args:
        size: workers, and so slots for each variant; spread evenly over the places.
        warm_up: called on each new worker's thread with its slots; what the first one measures is kept.
        probe: runs a synthetic batch on a worker's slots and raises when that fails.
    """

    def __init__(
        self,
        name: str,
        executors: Mapping[str, Executor],
        size: int,
        listener: Listener,
        warm_up: Callable[[Slots], Curves],
        probe: Callable[[Slots], None],
    ) -> None:
        self.size = size
        self.idle: list[Worker] = []  # the last one to finish runs next: its caches are warm
        self.busy: dict[Worker, Execution | None] = {}  # None: a probe
        self.curves: Curves = {}
        self._name = name
        self._executors = dict(executors)
        self._places = max((len(executor.parts) for executor in executors.values()), default=1)
        self._place: dict[Worker, int] = {}
        self._lost_places: dict[int, str] = {}
        self._listener = listener
        self._warm_up = warm_up
        self._probe = probe
        self._loop = asyncio.get_running_loop()
        self._opening = 0
        self._born = 0
        self._deaths = 0
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S
        self._lost: str | None = None  # for good
        self._dying: str | None = None  # until a replacement is there
        self._sick: str | None = None  # until a probe succeeds
        self._closing = False
        self._opened: asyncio.Event = asyncio.Event()
        self._timers: set[asyncio.TimerHandle] = set()
        self._calls = Calls(name)
        self._generation = 0  # of the executors; counts installations
        for number in range(size):
            self._hire(number % self._places)

    # --- state ------------------------------------------------------------------------------------
    @property
    def fault(self) -> str | None:
        """Why the model should get no traffic; None when all is well."""
        return self._lost or next(iter(self._lost_places.values()), None) or self._dying or self._sick

    @property
    def gone(self) -> str | None:
        """Why nothing will run any more; None while something can."""
        return self._lost

    @property
    def running(self) -> list[Execution]:
        """What the busy workers run, probes apart."""
        return [execution for execution in self.busy.values() if execution is not None]

    @property
    def failed(self) -> int:
        """Workers that are missing."""
        return self.size - len(self.idle) - len(self.busy)

    async def hand_over_s(self) -> float:
        """Seconds from the loop's thread to an idle worker and back, measured now."""
        return await self._calls.hand_over_s(lambda: self.idle[-1] if self.idle else None)

    async def opened(self) -> None:
        """Returns when every worker is open or has failed to open. Raises EngineError when none is."""
        while self._opening:
            self._opened.clear()
            await self._opened.wait()
        if not self.idle and not self.busy:
            raise EngineError(self._lost or self._dying or "no slot could be opened")

    # --- work -------------------------------------------------------------------------------------
    def run(self, execution: Execution) -> None:
        """Gives it to an idle worker; there must be one."""
        worker = self._next()
        self.busy[worker] = execution
        execution.place = self._place[worker]

        def job(slots: Slots) -> None:
            execution.execute(slots[execution.precision])
            self._calls.post(self._finished, worker, execution)

        worker.submit(job)

    def _next(self) -> Worker:
        """The one that idles for the shortest time, on the device that has the fewest busy ones."""
        if self._places == 1:
            return self.idle.pop()
        busy = Counter(self._place[worker] for worker in self.busy)
        worker = min(reversed(self.idle), key=lambda worker: busy[self._place[worker]])
        self.idle.remove(worker)
        return worker

    def _rest(self, worker: Worker) -> None:
        """The worker has nothing to do; on a lost device it never will."""
        if self._place[worker] in self._lost_places:
            worker.close()
        else:
            self.idle.append(worker)

    def _finished(self, worker: Worker, execution: Execution) -> None:
        del self.busy[worker]
        if isinstance(execution.error, DeviceFailed):
            self._lose(execution.place, execution.error)
        self._rest(worker)
        if execution.error is None:
            self._healthy()
        self._listener.execution_finished(execution)

    def failed_execution(self, error: VernierError, place: int = 0) -> None:
        """An execution failed on its own account: its request ran alone, or will be tried alone."""
        if isinstance(error, DeviceFailed):
            self._lose(place, error)
            return
        self._failures += 1
        if self._failures == _SUSPICIOUS_FAILURES:
            self._start_probe()

    def _healthy(self) -> None:
        self._deaths = 0
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S
        self._sick = None

    def _start_probe(self) -> None:
        if self._closing or self._lost:
            return
        if not self.idle:
            self._later(_FIRST_PAUSE_S, self._start_probe)
            return
        worker = self.idle.pop()
        self.busy[worker] = None

        def job(slots: Slots) -> None:
            error: VernierError | None = None
            try:
                self._probe(slots)
            except VernierError as caught:
                error = caught
            self._calls.post(self._probed, worker, error)

        worker.submit(job)

    def _probed(self, worker: Worker, error: VernierError | None) -> None:
        del self.busy[worker]
        if isinstance(error, DeviceFailed):
            self._lose(self._place[worker], error)
        self._rest(worker)
        if error is None:
            self._healthy()
        elif not isinstance(error, DeviceFailed):
            self._sick = f"executions fail: {error.message}"
            logger.error("engine sick", extra={"model": self._name, "error": error.message})
            self._later(self._pause_s, self._start_probe)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._listener.worker_idle()

    # --- life and death ---------------------------------------------------------------------------
    def _hire(self, place: int) -> None:
        if self._closing or self._lost or place in self._lost_places:
            return
        self._opening += 1
        self._born += 1
        generation = self._generation

        def on_open(worker: Worker, slots: Slots) -> None:
            self._calls.post(self._open, worker, self._warm_up(slots), generation)

        def on_exit(worker: Worker, error: BaseException | None) -> None:
            self._calls.post(self._exited, worker, error)

        parts = [_part(executor, place) for executor in self._executors.values()]
        self._place[Worker(f"{self._name}-{self._born}", parts, on_open, on_exit)] = place

    def _open(self, worker: Worker, curves: Curves, generation: int) -> None:
        self._opening -= 1
        self._opened.set()
        if self._closing:
            worker.close()
            return
        if generation != self._generation:  # an executor was replaced in the meantime
            worker.close()
            self._hire(self._place[worker])
            return
        self._rest(worker)
        self.curves = self.curves or curves
        if self.failed == 0:
            self._dying = None
        self._listener.worker_idle()

    def _exited(self, worker: Worker, error: BaseException | None) -> None:
        was_open = worker in self.idle or worker in self.busy
        if worker in self.idle:
            self.idle.remove(worker)
        execution = self.busy.pop(worker, None)
        place = self._place.pop(worker)
        self._calls.ended(worker)
        if error is None:
            return
        if not was_open:
            self._opening -= 1
            self._opened.set()
        reason = (
            f"a worker died ({_describe(error)})"
            if was_open
            else f"a slot cannot be opened ({_describe(error)})"
        )
        if self._closing:
            if execution is not None:
                self._listener.execution_lost(execution, EngineError(f"{reason} while it ran the batch"))
            return
        self._deaths += 1
        logger.error("worker died", extra={"model": self._name, "error": _describe(error)}, exc_info=error)
        self._dying = reason
        if isinstance(error, DeviceFailed):
            self._lose(place, error)
        elif self._deaths <= MOST_DEATHS:
            self._later(self._pause_s if self._deaths > 1 else 0.0, partial(self._hire, place))
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        elif not self.idle and not self.busy and not self._opening:
            self._give_up(EngineError(f"every slot has failed; the last one: {reason}"))
        if execution is not None:
            self._listener.execution_lost(execution, EngineError(f"{reason} while it ran the batch"))
        self._listener.worker_idle()

    def _lose(self, place: int, error: VernierError) -> None:
        """The device of this place runs nothing any more; when it was the last one, nothing will run at all."""
        if place in self._lost_places:
            return
        self._lost_places[place] = error.message
        if len(self._lost_places) == self._places:
            self._give_up(error)
            return
        logger.critical("device lost", extra={"model": self._name, "error": error.message})
        for worker in [worker for worker in self.idle if self._place[worker] == place]:
            self.idle.remove(worker)
            worker.close()

    def _give_up(self, error: VernierError) -> None:
        if self._lost is None:
            self._lost = error.message
            logger.critical("model lost", extra={"model": self._name, "error": error.message})
            self._listener.device_lost(EngineError(error.message))

    # --- variants ---------------------------------------------------------------------------------
    async def install(self, executor: Executor) -> None:
        """Opens a slot of `executor` on every worker, in place of an earlier one of its precision.

        Raises:
            EngineError: a slot could not be opened; the workers keep what they had.
        """
        precision = executor.precision
        workers = [*self.idle, *self.busy]
        opened = await asyncio.gather(
            *(
                self._calls.call(worker, partial(open_slot, self._part_of(executor, worker)))
                for worker in workers
            ),
            return_exceptions=True,
        )
        failed = [slot for slot in opened if isinstance(slot, BaseException)]
        swap = close_slot if failed else partial(swap_slot, precision)
        if not failed:
            self._executors[precision] = executor
            self._generation += 1
            for worker in {*self.idle, *self.busy} - set(workers):  # born while the slots were opened
                worker.submit(partial(replace_slot, precision, self._part_of(executor, worker)))
        done = [
            self._calls.call(worker, partial(swap, slot))
            for worker, slot in zip(workers, opened, strict=True)
            if not isinstance(slot, BaseException)
        ]
        await asyncio.gather(*done, return_exceptions=True)  # a worker that dies now is replaced anyway
        if failed:
            raise EngineError(f"a slot of the new engine cannot be opened: {_describe(failed[0])}")

    def _part_of(self, executor: Executor, worker: Worker) -> Executor:
        return _part(executor, self._place[worker])

    # --- time and end -----------------------------------------------------------------------------
    def _later(self, pause_s: float, call: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(handle)
            call()

        handle = self._loop.call_later(pause_s, run)
        self._timers.add(handle)

    async def close(self, timeout_s: float) -> None:
        """Ends the workers after what they run, waiting at most `timeout_s` for it."""
        self._closing = True
        for handle in self._timers:
            handle.cancel()
        workers = list(self._place)  # those of a lost device and those that are being born too
        for worker in workers:
            worker.close()
        ended = await asyncio.gather(*(asyncio.to_thread(worker.join, timeout_s) for worker in workers))
        if not all(ended):
            logger.error("a worker still runs", extra={"model": self._name, "workers": ended.count(False)})


def _part(executor: Executor, place: int) -> Executor:
    """What of the executor lies on the device of this place."""
    return executor.parts[place % len(executor.parts)]


def _describe(error: BaseException) -> str:
    return error.message if isinstance(error, VernierError) else repr(error)
