"""When to run what: the batch policy as pure functions of (queue, now, slots, latency curve, rate).

`decide` is asked whenever a slot is idle and something waits. It dispatches at once

    full       the batch is as large as it may become
    idle       no slot is busy, or nothing should come soon enough that would gain from joining
    delay      the oldest request has waited long enough
    deadline   the tightest due time leaves no room to wait, or none for a larger batch

and otherwise says until when to wait for more. Two batches of R rows take 2·T(R) of slots' time, joined they take
T(2R): what joining saves, spread over the n slots, is as long as a batch is held while others run, and
`max_queue_delay_s` at the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vernier.serving.queueing.latency import LatencyCurve

FULL, DEADLINE, DELAY, IDLE = "full", "deadline", "delay", "idle"

#: Capacity above the arrival rate that a smaller batch must leave, or the queue would grow.
_HEADROOM = 1.1


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator asks for.

    Attributes:
        max_rows: the largest batch.
        max_queue_delay_s: the longest that a request is held back, while a slot is idle, for others to join.
        objective_s: the latency that requests should stay under; None for none.
    """

    max_rows: int
    max_queue_delay_s: float = 0.002
    objective_s: float | None = None


class Waiting(NamedTuple):
    """One batch queue. Times are on the caller's clock.

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
    """idle: free now. total: idle and busy."""

    idle: int
    total: int


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


def _hold_s(waiting: Waiting, slots: Slots, curve: LatencyCurve, rate: float) -> float:
    """How long after its oldest request's arrival a batch should leave; see the module."""
    if slots.idle == slots.total:
        return 0.0
    rows = waiting.rows
    saved = (2.0 * curve.seconds(rows) - curve.seconds(2 * rows)) / slots.total
    return saved if rate * saved >= 1.0 else 0.0


def decide(
    waiting: Waiting, now: float, slots: Slots, curve: LatencyCurve, rate: float, limits: Limits
) -> Decision:
    """What to do with a batch queue while a slot is idle.

    Args:
        rate: rows per second that arrive.
    """
    cap = batch_cap(curve, limits, slots.total)
    if waiting.rows >= cap:
        return _shrink(waiting, now, slots, curve, rate, max(cap, waiting.head_rows), FULL)
    reason = IDLE
    hold_s = min(_hold_s(waiting, slots, curve, rate), limits.max_queue_delay_s)
    if hold_s > 0.0:
        until, reason = waiting.oldest + hold_s, DELAY
        if waiting.due is not None:
            must_start = waiting.due - curve.pessimistic(waiting.rows + 1)
            if must_start < until:
                until, reason = must_start, DEADLINE
        if until > now:
            return Wait(until)
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
