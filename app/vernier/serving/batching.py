"""When to run what: the batch policy as pure functions of (queue, now, slots, latency curve).

`decide` is asked whenever a slot is idle and something waits. It dispatches at once

    full       the batch is as large as it may become
    deadline   the tightest due time leaves no room to wait, or none for a larger batch
    delay      the oldest request has waited `max_queue_delay_s`
    idle       waiting would not pay: the usual case when a slot is free

and otherwise says until when to wait for more. With R rows waiting, T the latency curve, λ rows arriving
a second, n slots, `age` the wait of the oldest so far, and `start` how long after its arrival the next row
would have to wait for a slot if the batch left now, waiting pays when either

    start + T(1) + R·T(R)  >  (R + 1)·T(R + 1) + age
        the next row gains more by joining than the waiting rows lose. On a flat curve this says: wait
        until this batch and the next one have waited equally long, which keeps the slots in step.
        While a second slot is idle, `start` is 0 and this never holds.
    age  <  0.9·F/n      with F = 2·T(b) − T(2b), for the least b with n·b ≥ 1.05·λ·T(b)
        the other slots are busy, batches of b rows are needed to keep up, and F of their time is spent
        whatever their size: spreading the dispatches over it keeps a slot in reserve for the tail.
        On a linear curve, where large batches gain nothing, F is 0.

Both were chosen by simulation (`vernier.serving.simulate`) against immediate dispatch and a fixed delay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vernier.serving.latency import LatencyCurve

FULL, DEADLINE, DELAY, IDLE = "full", "deadline", "delay", "idle"

#: The question is asked again after this many times as long as the next row should take.
_PATIENCE = 2.0
#: Capacity above the arrival rate that a smaller batch must leave, or the queue would grow.
_HEADROOM = 1.1
#: The same for the batch size that dispatches are spread for, and the share of F/n they are spread over.
_PACE_HEADROOM, _PACE = 1.05, 0.9


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator asks for.

    Attributes:
        max_rows: the largest batch.
        max_queue_delay_s: how long a request may be held back, while a slot is idle, for others to join.
        objective_s: the latency that requests should stay under; None for none.
    """

    max_rows: int
    max_queue_delay_s: float = 0.002
    objective_s: float | None = None


class Waiting(NamedTuple):
    """One lane. Times are on the caller's clock.

    rows: of all requests.
    head_rows: of the request that goes first.
    oldest: arrival of the one that has waited longest.
    due: when the first must be answered: its deadline or its objective; None when it has neither.
    """

    rows: int
    head_rows: int
    oldest: float
    due: float | None


class Slots(NamedTuple):
    """idle: free now. total: idle and busy. next_free: when the first busy one should be free, or None."""

    idle: int
    total: int
    next_free: float | None = None


class Dispatch(NamedTuple):
    """Run up to `rows` rows now."""

    rows: int
    reason: str


class Wait(NamedTuple):
    """Ask again at `until`, or when something arrives."""

    until: float


Decision = Dispatch | Wait
Decide = Callable[[Waiting, float, Slots, LatencyCurve, float, Limits], Decision]


def batch_cap(curve: LatencyCurve, limits: Limits, total_slots: int) -> int:
    """The largest batch that leaves the objective in reach.

    A request that arrives just after a dispatch waits for one execution, or its share of one when several
    slots take turns, and then for its own: T(b)·(1 + 1/slots) must fit. When nothing fits, the
    objective cannot be met and only throughput is left to care for.
    """
    if limits.objective_s is None or not curve.known:
        return limits.max_rows
    rows = curve.rows_within(limits.objective_s / (1.0 + 1.0 / max(1, total_slots)))
    return min(rows, limits.max_rows) if rows else limits.max_rows


def _fitting_bucket(curve: LatencyCurve, rows: int) -> int:
    """`rows` padded up to the next bucket, or cut to the one below, whichever answers sooner on average.

    Cut, the rest runs after: it costs rest·T(rest) more, and spares everyone T(up) − T(down).
    """
    if curve.exact:
        return rows
    down = curve.bucket_below(rows)
    rest = rows - down
    if rest <= 0 or down < 1:
        return rows
    gain = rows * (curve.seconds(rows) - curve.seconds(down))
    return down if gain > rest * curve.seconds(rest) else rows


def _keeps_up(curve: LatencyCurve, rows: int, rate: float, slots: int) -> bool:
    """Whether batches of `rows` work off what arrives."""
    return rows * slots >= rate * _HEADROOM * curve.seconds(rows)


def _waiting_pays(waiting: Waiting, now: float, slots: Slots, curve: LatencyCurve, rate: float) -> bool:
    """See the module."""
    if rate <= 0.0 or not curve.known:
        return False
    age = now - waiting.oldest
    if slots.idle <= 1:
        rows = waiting.rows
        run = curve.seconds(rows)
        free = run if slots.next_free is None else min(run, max(0.0, slots.next_free - now))
        start = max(0.0, free - 1.0 / rate)
        if start + curve.seconds(1) + rows * run > (rows + 1) * curve.seconds(rows + 1) + age:
            return True
    if slots.idle == slots.total:
        return False
    return age < _PACE * _fixed_part(curve, _needed_rows(curve, rate, slots.total)) / slots.total


def _needed_rows(curve: LatencyCurve, rate: float, slots: int) -> int:
    """The smallest batch that keeps up with the rate; the largest when none does."""
    low, high = 1, curve.largest
    while low < high:
        middle = (low + high) // 2
        if middle * slots >= rate * _PACE_HEADROOM * curve.seconds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fixed_part(curve: LatencyCurve, rows: int) -> float:
    """Seconds of a batch of `rows` that a smaller one would take, too; 0 where single rows keep up."""
    if rows <= 1:
        return 0.0
    half = rows // 2
    slope = (curve.seconds(rows) - curve.seconds(half)) / (rows - half)
    return max(0.0, curve.seconds(rows) - rows * slope)


def decide(
    waiting: Waiting, now: float, slots: Slots, curve: LatencyCurve, rate: float, limits: Limits
) -> Decision:
    """What to do with a lane while a slot is idle.

    Args:
        rate: rows per second that arrive for this lane.
    """
    cap = batch_cap(curve, limits, slots.total)
    if waiting.rows >= cap:
        return _shrink(waiting, now, slots, curve, rate, max(cap, waiting.head_rows), FULL)
    latest = waiting.oldest + limits.max_queue_delay_s
    must_start = None if waiting.due is None else waiting.due - curve.pessimistic(waiting.rows + 1)
    if latest > now and (must_start is None or must_start > now):
        if _waiting_pays(waiting, now, slots, curve, rate):
            until = min(latest, now + _PATIENCE / rate)
            return Wait(until if must_start is None else min(until, must_start))
        reason = IDLE
    else:
        reason = DELAY if latest <= now else DEADLINE
    rows = max(_fitting_bucket(curve, waiting.rows), waiting.head_rows)
    return _shrink(waiting, now, slots, curve, rate, rows, reason)


def _shrink(
    waiting: Waiting, now: float, slots: Slots, curve: LatencyCurve, rate: float, rows: int, reason: str
) -> Dispatch:
    """A smaller batch when only that answers the first request in time, and the others can afford it.

    Without the second condition one late request after the other would make batches of one, the queue
    would grow, and everybody would be late.
    """
    due = waiting.due
    if due is not None and now + curve.seconds(rows) > due:
        smaller = max(curve.bucket_below(curve.rows_within(due - now)), waiting.head_rows)
        if (
            smaller < rows
            and now + curve.seconds(smaller) <= due
            and _keeps_up(curve, smaller, rate, slots.total)
        ):
            return Dispatch(smaller, DEADLINE)
    return Dispatch(rows, reason)


class Forecast:
    """When requests that arrive now should be answered.

    What waits before one leaves in the largest batches allowed, on the slots as they get free; it itself
    runs in the batch that still has room, which will have been filled by others until it starts.

    Args:
        free_at: when each slot should be free; idle ones: in the past.
        rate: rows per second that arrive behind it.
    """

    __slots__ = ("_cap", "_curve", "_free", "_full_s", "_now", "_rate")

    def __init__(
        self, free_at: Sequence[float], now: float, curve: LatencyCurve, rate: float, limits: Limits
    ) -> None:
        self._now = now
        self._curve = curve
        self._rate = rate
        self._free = sorted([max(now, at) for at in free_at]) if curve.known else []
        self._cap = batch_cap(curve, limits, len(free_at))
        self._full_s = curve.pessimistic(self._cap)

    def finish(self, rows: int, ahead: int) -> float:
        """For a request of `rows` rows behind `ahead` rows; now while nothing is known."""
        free, cap, now = self._free, self._cap, self._now
        if not free:
            return now
        # Whole batches before the one that takes its last row.
        batches = (ahead + rows - 1) // cap
        start = free[batches % len(free)] + batches // len(free) * self._full_s
        company = ahead + rows - batches * cap + int(self._rate * (start - now))
        return start + (self._full_s if company >= cap else self._curve.pessimistic(company))

    def last_with(self, rows: int, before: int, number: int) -> int:
        """Of requests of `rows` rows each behind `before` rows, the last one whose last row is in the same batch as the
        last row of the request with this number; that request itself while nothing is known."""
        if not self._free:
            return number
        batches = (before + (number + 1) * rows - 1) // self._cap
        return ((batches + 1) * self._cap - before) // rows - 1
