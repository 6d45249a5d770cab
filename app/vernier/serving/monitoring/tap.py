"""The tap: a share of the answered requests is shown to a listener."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random

from vernier.border.batch import RequestBatch
from vernier.tensors import Arrays

#: Gets copies of the inputs and outputs of an answered request, and the variant that computed it, on the loop's
#: thread: it must only enqueue.
Tap = Callable[[Arrays, Arrays, str], None]
#: Requests of a batch that have been answered together, and their outputs.
Shown = tuple[RequestBatch, range, Arrays]


class AnswerTap:
    """Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._listener: Tap | None = None
        self._share = 0.0
        self._quiet_s = float("inf")
        self._owed = 0.0
        self._shown = 0.0
        self._random = Random(0)

    def set(self, listener: Tap | None, share: float, quiet_s: float) -> None:
        """See `Scheduler.set_tap`."""
        self._listener, self._share, self._quiet_s, self._owed = listener, share, quiet_s, 0.0

    @property
    def wanted(self) -> bool:
        """Whether there is a listener."""
        return self._listener is not None

    def show(self, answered: Sequence[Shown], precision: str, now: float) -> None:
        """Shows the listener its share of these requests."""
        assert self._listener is not None
        before = list(accumulate((len(requests) for _, requests, _ in answered), initial=0))
        for number in self._chosen(before[-1], now):
            at = bisect_right(before, number) - 1
            batch, requests, outputs = answered[at]
            self._listener(*_copies(batch, requests, requests[number - before[at]], outputs), precision)

    def _chosen(self, count: int, now: float) -> Sequence[int]:
        """Which of `count` answers are shown: the share, at random, in one step for all of them."""
        self._owed += self._share * count
        shown = min(int(self._owed), count)
        self._owed -= shown
        if not shown and now - self._shown >= self._quiet_s:
            shown = 1
        if not shown:
            return ()
        self._shown = now
        return range(count) if shown == count else self._random.sample(range(count), shown)


def _copies(batch: RequestBatch, requests: range, request: int, outputs: Arrays) -> tuple[Arrays, Arrays]:
    """Inputs and outputs of one of the requests that `outputs` are of. Copied, because what the listener keeps must
    not keep the memory of all of them, and the inputs' memory is the front's."""
    starts = batch.state.starts
    if len(batch) == 1:  # whose arrays need not have a batch axis
        return _copied(batch.inputs, slice(None)), _copied(outputs, slice(None))
    before = starts[requests.start]
    start, stop = starts[request], starts[request + 1]
    return _copied(batch.inputs, slice(start, stop)), _copied(outputs, slice(start - before, stop - before))


def _copied(arrays: Arrays, rows: slice) -> Arrays:
    return {name: array[rows].copy() if array.ndim else array.copy() for name, array in arrays.items()}
