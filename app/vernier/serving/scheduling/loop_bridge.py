"""The way between the event loop's thread and the workers': jobs whose end is awaited, and news from them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from vernier.engine.pool import OpenSlots, Worker
from vernier.errors import EngineError

logger = logging.getLogger(__name__)


class LoopBridge:
    """Belongs to the event loop's thread, but for `post`.

    Args:
        name: the model's, for logs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Worker, set[asyncio.Future[Any]]] = {}

    def post(self, call: Callable[..., None], *args: Any) -> None:
        """From a worker's thread to the loop's."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            logger.warning("the event loop ended before a worker did", extra={"model": self._name})

    def call(self, worker: Worker, function: Callable[[OpenSlots], Any]) -> asyncio.Future[Any]:
        """Runs a function on a worker's thread; resolves when it has, or when the worker has died."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def job(slots: OpenSlots) -> None:
            try:
                result = function(slots)
            except Exception as error:
                self.post(_resolve, future, None, error)
            else:
                self.post(_resolve, future, result, None)

        waiting = self._waiting.setdefault(worker, set())
        waiting.add(future)
        future.add_done_callback(waiting.discard)
        if worker.alive:
            worker.submit(job)
        else:
            _resolve(future, None, EngineError("the worker ended"))
        return future

    def ended(self, worker: Worker) -> None:
        """The worker will run nothing any more: what it was asked for fails."""
        for future in self._waiting.pop(worker, ()):
            _resolve(future, None, EngineError("the worker ended"))

    async def hand_over_s(self, worker: Callable[[], Worker | None], times: int = 7) -> float:
        """Seconds from the loop's thread to a worker and back, measured now: the median.

        Args:
            worker: gives an idle one each time, if there is one; 0 s when there never was.
        """
        taken = []
        for _ in range(times):
            idle = worker()
            if idle is not None:
                began = self._loop.time()
                await self.call(idle, lambda slots: None)
                taken.append(self._loop.time() - began)
        return sorted(taken)[len(taken) // 2] if taken else 0.0


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
