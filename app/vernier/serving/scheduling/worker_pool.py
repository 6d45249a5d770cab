"""The workers of one model version, seen from the event loop's thread: which are idle, which died, which replace them.

A worker posts to the loop once for each batch. When one dies, the batch it held is reported lost, once, the
fault shows in readiness until its replacement has opened its slots, and a worker that keeps dying
is given up. After several failed executions in a row a synthetic one asks whether the engine or the
requests are to blame; while the engine is, readiness says so, and the probe is repeated until it succeeds.

Where the executors span several devices each worker keeps to one. A device that fails takes its
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
from vernier.engine.pool import OpenSlots, Worker, close_slot, open_slot, replace_slot, swap_slot
from vernier.errors import DeviceFailed, EngineError, VernierError
from vernier.serving.scheduling.execution import Execution
from vernier.serving.scheduling.loop_bridge import LoopBridge

logger = logging.getLogger(__name__)

#: Deaths in a row, with no batch finished in between, after which a worker is not replaced any more.
MAX_DEATHS = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 30.0
#: Failed executions in a row that raise the question whether the engine still works.
_SUSPICIOUS_FAILURES = 3

Curves = dict[str, dict[int, float]]


class Listener(Protocol):
    """Is told what becomes of workers and executions, on the event loop's thread."""

    def worker_idle(self) -> None:
        """A worker is idle that was not idle before."""

    def execution_finished(self, execution: Execution) -> None:
        """The execution has outputs or an error, and its worker is idle again."""

    def execution_lost(self, execution: Execution, error: EngineError) -> None:
        """The worker died while it ran this execution."""

    def device_lost(self, error: EngineError) -> None:
        """Nothing can run any more until the process restarts."""


class WorkerPool:
    """Belongs to the event loop's thread.

    Args:
        size: workers, and so slots for each variant; spread evenly over the devices.
        warm_up: called on each new worker's thread with its slots; what the first one measures is kept.
        probe: runs a synthetic batch on a worker's slots and raises when that fails.
    """

    def __init__(
        self,
        name: str,
        executors: Mapping[str, Executor],
        size: int,
        listener: Listener,
        warm_up: Callable[[OpenSlots], Curves],
        probe: Callable[[OpenSlots], None],
    ) -> None:
        self.size = size
        self.idle: list[Worker] = []  # the last one to finish runs next: its caches are warm
        self.busy: dict[Worker, Execution | None] = {}  # None: a probe
        self.curves: Curves = {}
        self._name = name
        self._executors = dict(executors)
        self._devices = max((len(executor.parts) for executor in executors.values()), default=1)
        self._device_of: dict[Worker, int] = {}
        self._lost_devices: dict[int, str] = {}
        self._listener = listener
        self._warm_up = warm_up
        self._probe = probe
        self._loop = asyncio.get_running_loop()
        self._opening = 0
        self._spawned = 0
        self._deaths = 0
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S
        self._lost: str | None = None  # for good
        self._restarting: str | None = None  # until a replacement is there
        self._unhealthy: str | None = None  # until a probe succeeds
        self._closing = False
        self._opened: asyncio.Event = asyncio.Event()
        self._timers: set[asyncio.TimerHandle] = set()
        self._bridge = LoopBridge(name)
        self._generation = 0  # of the executors; counts installations
        for number in range(size):
            self._spawn(number % self._devices)

    # --- state ------------------------------------------------------------------------------------
    @property
    def fault(self) -> str | None:
        """Why the model should get no traffic; None when all is well."""
        return (
            self._lost or next(iter(self._lost_devices.values()), None) or self._restarting or self._unhealthy
        )

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
        return await self._bridge.hand_over_s(lambda: self.idle[-1] if self.idle else None)

    async def opened(self) -> None:
        """Returns when every worker is open or has failed to open. Raises EngineError when none is."""
        while self._opening:
            self._opened.clear()
            await self._opened.wait()
        if not self.idle and not self.busy:
            raise EngineError(self._lost or self._restarting or "no slot could be opened")

    # --- work -------------------------------------------------------------------------------------
    def run(self, execution: Execution) -> None:
        """Gives the execution to an idle worker; there must be one."""
        worker = self._next()
        self.busy[worker] = execution
        execution.device_index = self._device_of[worker]

        def job(slots: OpenSlots) -> None:
            execution.execute(slots[execution.precision])
            self._bridge.post(self._finished, worker, execution)

        worker.submit(job)

    def _next(self) -> Worker:
        """The worker that has idled for the shortest time, on the device that has the fewest busy workers."""
        if self._devices == 1:
            return self.idle.pop()
        busy = Counter(self._device_of[worker] for worker in self.busy)
        worker = min(reversed(self.idle), key=lambda worker: busy[self._device_of[worker]])
        self.idle.remove(worker)
        return worker

    def _rest(self, worker: Worker) -> None:
        """The worker has nothing to do; on a lost device it never will."""
        if self._device_of[worker] in self._lost_devices:
            worker.close()
        else:
            self.idle.append(worker)

    def _finished(self, worker: Worker, execution: Execution) -> None:
        del self.busy[worker]
        if isinstance(execution.error, DeviceFailed):
            self._lose(execution.device_index, execution.error)
        self._rest(worker)
        if execution.error is None:
            self._healthy()
        self._listener.execution_finished(execution)

    def failed_execution(self, error: VernierError, device_index: int = 0) -> None:
        """An execution failed on its own account: its request ran alone, or will be tried alone."""
        if isinstance(error, DeviceFailed):
            self._lose(device_index, error)
            return
        self._failures += 1
        if self._failures == _SUSPICIOUS_FAILURES:
            self._start_probe()

    def _healthy(self) -> None:
        self._deaths = 0
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S
        self._unhealthy = None

    def _start_probe(self) -> None:
        if self._closing or self._lost:
            return
        if not self.idle:
            self._later(_FIRST_PAUSE_S, self._start_probe)
            return
        worker = self.idle.pop()
        self.busy[worker] = None

        def job(slots: OpenSlots) -> None:
            error: VernierError | None = None
            try:
                self._probe(slots)
            except VernierError as caught:
                error = caught
            self._bridge.post(self._probed, worker, error)

        worker.submit(job)

    def _probed(self, worker: Worker, error: VernierError | None) -> None:
        del self.busy[worker]
        if isinstance(error, DeviceFailed):
            self._lose(self._device_of[worker], error)
        self._rest(worker)
        if error is None:
            self._healthy()
        elif not isinstance(error, DeviceFailed):
            self._unhealthy = f"executions fail: {error.message}"
            logger.error("engine unhealthy", extra={"model": self._name, "error": error.message})
            self._later(self._pause_s, self._start_probe)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._listener.worker_idle()

    # --- life and death ---------------------------------------------------------------------------
    def _spawn(self, device_index: int) -> None:
        if self._closing or self._lost or device_index in self._lost_devices:
            return
        self._opening += 1
        self._spawned += 1
        generation = self._generation

        def on_open(worker: Worker, slots: OpenSlots) -> None:
            self._bridge.post(self._open, worker, self._warm_up(slots), generation)

        def on_exit(worker: Worker, error: BaseException | None) -> None:
            self._bridge.post(self._exited, worker, error)

        parts = [_part(executor, device_index) for executor in self._executors.values()]
        self._device_of[Worker(f"{self._name}-{self._spawned}", parts, on_open, on_exit)] = device_index

    def _open(self, worker: Worker, curves: Curves, generation: int) -> None:
        self._opening -= 1
        self._opened.set()
        if self._closing:
            worker.close()
            return
        if generation != self._generation:  # an executor was replaced in the meantime
            worker.close()
            self._spawn(self._device_of[worker])
            return
        self._rest(worker)
        self.curves = self.curves or curves
        if self.failed == 0:
            self._restarting = None
        self._listener.worker_idle()

    def _exited(self, worker: Worker, error: BaseException | None) -> None:
        was_open = worker in self.idle or worker in self.busy
        if worker in self.idle:
            self.idle.remove(worker)
        execution = self.busy.pop(worker, None)
        device_index = self._device_of.pop(worker)
        self._bridge.ended(worker)
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
        self._restarting = reason
        if isinstance(error, DeviceFailed):
            self._lose(device_index, error)
        elif self._deaths <= MAX_DEATHS:
            self._later(self._pause_s if self._deaths > 1 else 0.0, partial(self._spawn, device_index))
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        elif not self.idle and not self.busy and not self._opening:
            self._give_up(EngineError(f"every slot has failed; the last one: {reason}"))
        if execution is not None:
            self._listener.execution_lost(execution, EngineError(f"{reason} while it ran the batch"))
        self._listener.worker_idle()

    def _lose(self, device_index: int, error: VernierError) -> None:
        """This device runs nothing any more; when it was the last one, nothing will run at all."""
        if device_index in self._lost_devices:
            return
        self._lost_devices[device_index] = error.message
        if len(self._lost_devices) == self._devices:
            self._give_up(error)
            return
        logger.critical("device lost", extra={"model": self._name, "error": error.message})
        for worker in [worker for worker in self.idle if self._device_of[worker] == device_index]:
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
                self._bridge.call(worker, partial(open_slot, self._part_of(executor, worker)))
                for worker in workers
            ),
            return_exceptions=True,
        )
        failed = [slot for slot in opened if isinstance(slot, BaseException)]
        swap = close_slot if failed else partial(swap_slot, precision)
        if not failed:
            self._executors[precision] = executor
            self._generation += 1
            for worker in {*self.idle, *self.busy} - set(workers):  # started while the slots were opened
                worker.submit(partial(replace_slot, precision, self._part_of(executor, worker)))
        done = [
            self._bridge.call(worker, partial(swap, slot))
            for worker, slot in zip(workers, opened, strict=True)
            if not isinstance(slot, BaseException)
        ]
        await asyncio.gather(*done, return_exceptions=True)  # a worker that dies now is replaced anyway
        if failed:
            raise EngineError(f"a slot of the new engine cannot be opened: {_describe(failed[0])}")

    def _part_of(self, executor: Executor, worker: Worker) -> Executor:
        return _part(executor, self._device_of[worker])

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
        workers = list(self._device_of)  # those of a lost device and those that are being started too
        for worker in workers:
            worker.close()
        ended = await asyncio.gather(*(asyncio.to_thread(worker.join, timeout_s) for worker in workers))
        if not all(ended):
            logger.error("a worker still runs", extra={"model": self._name, "workers": ended.count(False)})


def _part(executor: Executor, device_index: int) -> Executor:
    """What of the executor lies on this device."""
    return executor.parts[device_index % len(executor.parts)]


def _describe(error: BaseException) -> str:
    return error.message if isinstance(error, VernierError) else repr(error)
