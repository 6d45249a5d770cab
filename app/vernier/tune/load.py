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

from vernier.border.batch import Answer, RequestBatch
from vernier.errors import VernierError
from vernier.serving.scheduling.scheduler import Scheduler
from vernier.tensors import Arrays

#: Seconds after the last request was due; answers that are still missing then are misses.
_PATIENCE_S = 2.0
#: Requests that are due together are handed over together, up to this number at a time.
_MAX_AT_ONCE = 256


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


class _Load:
    """The target of all requests of a load; the token of each is when it was due.

    Attributes:
        living: the batches of one request that are under way.
        over: set when all of `left` requests have ended.
    """

    def __init__(self, left: int) -> None:
        self.left = left
        self.latencies: list[float] = []
        self.living: set[RequestBatch] = set()
        self.over = asyncio.Event()

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        now = monotonic()
        self.latencies += [now - batch.tokens[at] for at in requests]

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        """The requests were not answered within any objective."""

    def released(self, batch: RequestBatch) -> None:
        self.living.discard(batch)
        self.left -= 1
        if not self.left:
            self.over.set()


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
    load = _Load(count)
    outputs = scheduler.outputs
    loop = asyncio.get_running_loop()
    began = monotonic() + 0.01
    stop = threading.Event()

    def submit(first: int, end: int) -> None:
        for i in range(first, end):
            at = began + float(due[i])
            batch = RequestBatch(requests[picks[i]], (rows,), outputs, None, 0, (at,), None, load, (at,))
            load.living.add(batch)
            scheduler.submit(batch)

    def watch() -> None:
        at = 0
        while at < count and not stop.is_set():
            now = monotonic() - began
            end = min(int(np.searchsorted(due, now, "right")), at + _MAX_AT_ONCE)
            if end > at:
                loop.call_soon_threadsafe(submit, at, end)
                at = end
            else:
                sleep(min(max(0.0, float(due[at]) - now), 0.05))

    thread = threading.Thread(target=watch, name="load", daemon=True)
    thread.start()
    try:
        async with asyncio.timeout(float(due[-1]) + _PATIENCE_S):
            await load.over.wait()
    except TimeoutError:
        pass
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
        for batch in list(load.living):
            scheduler.cancel(batch, 0)
    return Outcome(count, np.sort(np.array(load.latencies)))
