"""An open-loop load on a scheduler of this very process: requests arrive when they arrive, answered or not.

A thread of its own watches the clock and hands over what is due, because the event loop's timers are too coarse and
would be late just when the loop is busy. Latency counts from the moment when a request was due, so that a load
that could not be sent in time shows as latency and not as a lower rate.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic, sleep

import numpy as np

from vernier.errors import RequestError, VernierError
from vernier.serving.request import Answer, PendingRequest
from vernier.serving.scheduler import Scheduler
from vernier.tensors import Arrays

#: Answers that are still missing so long after the last request was due are misses.
_PATIENCE_S = 2.0
#: Requests that are due together are handed over together, up to so many at a time.
_MOST_AT_ONCE = 256


@dataclass(frozen=True)
class Outcome:
    """What became of one load.

    Attributes:
        offered: requests that were due.
        latencies_s: of the answered ones, ascending.
    """

    offered: int
    latencies_s: np.ndarray[tuple[int], np.dtype[np.float64]]

    def within(self, seconds: float) -> float:
        """Share of all offered requests that were answered within `seconds`."""
        return float(np.searchsorted(self.latencies_s, seconds, "right")) / max(1, self.offered)

    def quantile_s(self, share: float) -> float:
        """The latency that `share` of the offered requests stayed under; infinity when fewer were answered."""
        rank = int(np.ceil(share * self.offered)) - 1
        return float(self.latencies_s[rank]) if 0 <= rank < len(self.latencies_s) else float("inf")


class _Tally:
    """Who is still under way. `over` is set when all of `left` have ended."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.latencies: list[float] = []
        self.living: set[_Timed] = set()
        self.over = asyncio.Event()

    def ended(self) -> None:
        self.left -= 1
        if not self.left:
            self.over.set()


class _Timed(PendingRequest):
    __slots__ = ("at", "tally")

    def __init__(self, inputs: Arrays, rows: int, at: float, tally: _Tally) -> None:
        super().__init__(inputs, rows)
        self.at = at
        self.tally = tally

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        if answer is not None:
            self.tally.latencies.append(monotonic() - self.at)
        self.tally.living.discard(self)
        self.tally.ended()


async def offer(
    scheduler: Scheduler, requests: Sequence[Arrays], rows: int, rate: float, seconds: float, seed: int
) -> Outcome:
    """Sends Poisson arrivals to a scheduler and waits until all of them have ended.

    Args:
        requests: inputs of `rows` rows each, sent in a random order.
        rate: requests per second.
        seed: the same seed gives the same arrivals in the same order.
    """
    rng = np.random.default_rng(seed)
    count = max(1, round(rate * seconds))
    due = np.cumsum(rng.exponential(1.0 / rate, count))
    picks = rng.integers(0, len(requests), count)
    tally = _Tally(count)
    loop = asyncio.get_running_loop()
    began = monotonic() + 0.01
    stop = threading.Event()

    def submit(first: int, end: int) -> None:
        for i in range(first, end):
            request = _Timed(requests[picks[i]], rows, began + float(due[i]), tally)
            try:
                scheduler.submit(request)
            except RequestError:
                tally.ended()  # refused at once, so not answered within any objective
            else:
                tally.living.add(request)

    def watch() -> None:
        at = 0
        while at < count and not stop.is_set():
            now = monotonic() - began
            end = min(int(np.searchsorted(due, now, "right")), at + _MOST_AT_ONCE)
            if end > at:
                loop.call_soon_threadsafe(submit, at, end)
                at = end
            else:
                sleep(min(max(0.0, float(due[at]) - now), 0.05))

    thread = threading.Thread(target=watch, name="load", daemon=True)
    thread.start()
    try:
        async with asyncio.timeout(float(due[-1]) + _PATIENCE_S):
            await tally.over.wait()
    except TimeoutError:
        pass
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
        for request in list(tally.living):
            scheduler.cancel(request)
    return Outcome(count, np.sort(np.array(tally.latencies)))
