"""Who is let into the queue: the bound on what waits, and the prediction of when an answer would come.

What a refusal stands on is not changed by refusing, so requests of one batch are decided on together, with the same
outcome as if they came one by one: of those with equal rows, the ones in front are let in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vernier.errors import QueueFull
from vernier.serving.batching import Forecast, Limits
from vernier.serving.latency import ArrivalRate, LatencyCurve, Margin
from vernier.serving.request_queue import RequestQueue
from vernier.serving.span import runs

#: Rows per second that fill every batch.
_CROWD = 1e12

#: When each slot should be free; idle ones: in the past.
FreeAt = Callable[[], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator asks for.

    Attributes:
        max_queue_delay_s, objective_s: see `vernier.serving.batching.Limits`.
        queue_limit: the most rows that wait; a request of more rows is let in where nothing waits.
        age_s: how much longer waiting outweighs one step of priority; also the patience of a request
            that has neither deadline nor objective.
    """

    max_queue_delay_s: float = 0.002
    objective_s: float | None = None
    queue_limit: int = 8192
    age_s: float = 1.0


class Asked(NamedTuple):
    """Requests that differ in their numbers and rows only. `rows`: of each. Times are on the caller's clock; they
    arrived after `earliest`, from when the objective counts."""

    rows: Sequence[int]
    priority: int
    deadline: float | None
    earliest: float


class Verdict(NamedTuple):
    """admitted: the numbers of those that are let in, as runs. promised: by the number of each, by when it should be
    answered; None where nothing was predicted, or instead of all where nothing was predicted for any. refusal: of the
    first of the others, for all of them; None when there are none."""

    admitted: Sequence[range]
    promised: Sequence[float | None] | None
    refusal: QueueFull | None


def first_true(numbers: range, holds: Callable[[int], bool]) -> int:
    """The first of consecutive numbers for which something holds that holds for all after it; the end when for none."""
    low, high = numbers.start, numbers.stop
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


class Admission:
    """Belongs to one thread, as the queue does.

    Attributes:
        rate: of the rows that arrive, refused ones among them.
        margin: between what is predicted and what is promised.
    """

    def __init__(self, policy: Policy, limits: Limits, queue: RequestQueue) -> None:
        self.rate = ArrivalRate()
        self.margin = Margin()
        self._policy = policy
        self._limits = limits
        self._queue = queue

    def judge(self, asked: Asked, curve: LatencyCurve, now: float, free_at: FreeAt) -> Verdict:
        """Who may wait. Nothing is queued and only the arrivals are counted.

        Args:
            curve: of the lane that they would wait in.
            free_at: asked only when a prediction is needed.
        """
        self.rate.add(asked.rows[0])
        verdict = self._decide(asked, curve, now, free_at)
        self.rate.add(sum(asked.rows[1:]))
        return verdict

    def refusal(self, asked: Asked, curve: LatencyCurve, now: float, free_at: FreeAt) -> QueueFull | None:
        """Why any of them would be refused now; None when none would. Nothing is counted."""
        return self._decide(asked, curve, now, free_at).refusal

    def _decide(self, asked: Asked, curve: LatencyCurve, now: float, free_at: FreeAt) -> Verdict:
        rows, objective_s = asked.rows, self._policy.objective_s
        count, equal = len(rows), rows.count(rows[0]) == len(rows)
        fit = self._fit(rows[0], count) if equal else count
        if asked.deadline is None and objective_s is None:
            if equal or self._queue.rows + sum(rows) <= self._policy.queue_limit:
                full = None
                if fit < count:
                    full = self._full(fit, fit * rows[0], curve, now, free_at())
                return Verdict((range(fit),) if fit else (), None, full)
            return self._each(asked, None, curve, now, free_at)
        ends = (
            asked.deadline,
            None if objective_s is None else asked.earliest + objective_s,
        )
        limit = min([end for end in ends if end is not None])
        if equal:
            return self._equal(asked, fit, limit, curve, now, free_at)
        return self._each(asked, limit, curve, now, free_at)

    def _fit(self, rows: int, count: int) -> int:
        """How many of `count` requests of so many rows each may wait."""
        waiting, limit = self._queue.rows, self._policy.queue_limit
        return min(count, max((limit - waiting) // rows, 0 if waiting else 1))

    def _equal(
        self, asked: Asked, fit: int, limit: float, curve: LatencyCurve, now: float, free_at: FreeAt
    ) -> Verdict:
        """Lets in up to `fit` requests of equal rows, but none that should finish after `limit`, unless it would start
        at once.

        When nothing stands before it, trying costs no other request anything, and a prediction that has become
        too high corrects itself instead of refusing everything for ever.
        """
        rows, count, rate = asked.rows[0], len(asked.rows), self.rate.per_second(now)
        before = self._queue.rows_ahead(asked.priority)
        free: tuple[float, ...] = ()
        certain = 0  # those in front that need no prediction
        if self._policy.objective_s is None:
            certain = self._in_time_for_sure(rows, fit, curve, now, limit)
        if certain < fit:
            free = free_at()
            if not certain and not before and not (free and min(free) > now):
                certain = 1
        refusal: QueueFull | None = None
        end = fit
        if certain < fit:
            forecast = Forecast(free, now, curve, rate, self._limits)
            end = self._first_late(forecast, rows, before, range(certain, fit), limit)
            if end < fit:
                ahead = before + end * rows
                crowded = Forecast(free, now, curve, _CROWD, self._limits).finish(rows, ahead)
                refusal = self._too_late(forecast.finish(rows, ahead), crowded, limit, now)
        if refusal is None and fit < count:
            refusal = self._full(fit, fit * rows, curve, now, free or free_at())
        promised = [None] * certain + [limit] * (end - certain) if end > certain else None
        return Verdict((range(end),) if end else (), promised, refusal)

    def _first_late(self, forecast: Forecast, rows: int, before: int, asked: range, limit: float) -> int:
        """The first of these requests that should finish after `limit`; `asked.stop` when none should."""
        margin = self.margin.seconds
        at = asked.start
        while at < asked.stop:
            # Of those whose last rows are in the same batch each finishes no sooner than the one before it.
            end = min(asked.stop, forecast.last_with(rows, before, at) + 1)
            if forecast.finish(rows, before + (end - 1) * rows) + margin > limit:
                return first_true(
                    range(at, end - 1),
                    lambda number: forecast.finish(rows, before + number * rows) + margin > limit,
                )
            at = end
        return at

    def _each(
        self, asked: Asked, limit: float | None, curve: LatencyCurve, now: float, free_at: FreeAt
    ) -> Verdict:
        """The same for requests of different rows, one after the other. limit: None where nothing is predicted."""
        objective_s = self._policy.objective_s
        rate = 0.0 if limit is None else self.rate.per_second(now)
        waiting, before = self._queue.rows, self._queue.rows_ahead(asked.priority)
        free: tuple[float, ...] = ()
        forecast: Forecast | None = None
        refusal: QueueFull | None = None
        promised: list[float | None] = [None] * len(asked.rows)
        admitted: list[int] = []
        entering = 0
        hopeless: set[int] = set()  # rows of those that were refused after the last one that was let in
        for number, rows in enumerate(asked.rows):
            if rows in hopeless:
                continue
            if waiting + entering + rows > self._policy.queue_limit and waiting + entering:
                hopeless.add(rows)
                refusal = refusal or self._full(len(admitted), entering, curve, now, free or free_at())
                continue
            if limit is not None and (
                objective_s is not None or not self._in_time_for_sure(entering + rows, 1, curve, now, limit)
            ):
                free = free or free_at()
                ahead = before + entering
                if ahead or (free and min(free) > now):
                    forecast = forecast or Forecast(free, now, curve, rate, self._limits)
                    finish = forecast.finish(rows, ahead)
                    if finish + self.margin.seconds > limit:
                        hopeless.add(rows)
                        if refusal is None:
                            crowded = Forecast(free, now, curve, _CROWD, self._limits).finish(rows, ahead)
                            refusal = self._too_late(finish, crowded, limit, now)
                        continue
                    promised[number] = limit
            admitted.append(number)
            hopeless.clear()
            entering += rows
        return Verdict(runs(admitted), promised if any(promised) else None, refusal)

    def _too_late(self, finish: float, crowded: float, limit: float, now: float) -> QueueFull:
        """Who comes back comes with others, and a tenth later, or it would stand on the edge again."""
        margin = self.margin.seconds
        return QueueFull(
            f"the answer would take {1e3 * (finish + margin - now):.3g} ms, which is more than the "
            f"{1e3 * (limit - now):.3g} ms allowed; retry after the given time, or allow more",
            crowded + margin - limit + 0.1 * (crowded + margin - now),
            "deadline",
        )

    def _full(
        self, entering: int, rows: int, curve: LatencyCurve, now: float, free: tuple[float, ...]
    ) -> QueueFull:
        """`entering`: requests that are let in before it, of `rows` rows together."""
        waiting = self._queue.rows + rows
        drained = Forecast(free, now, curve, 0.0, self._limits).finish(1, waiting)
        return QueueFull(
            f"{self._queue.requests + entering} requests of {waiting} rows wait already; retry after the given time",
            drained - now,
        )

    def _in_time_for_sure(
        self, rows: int, count: int, curve: LatencyCurve, now: float, deadline: float
    ) -> int:
        """The quick answer for deadlines that are far away: how many of `count` requests of so many rows each, from the
        front, one slot alone would answer in time."""

        def late(number: int) -> bool:
            # What runs, full batches before it, one for the remainder, and its own.
            batches = 3 + (self._queue.rows + number * rows) // self._limits.max_rows
            return now + batches * curve.worst_s > deadline

        return count if not late(count) else first_true(range(1, count), late) - 1

    def answered(self, promised: float, arrived: float, now: float, count: int) -> None:
        """Learns from answers to `count` requests whether it was right to let them in."""
        self.margin.observe(now > promised, promised - arrived, count)
