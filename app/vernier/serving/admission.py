"""Who is let into the queue: the bound on what waits, and the prediction of when an answer would come.

What a refusal stands on is not changed by refusing, so requests that differ in their numbers and rows only are decided
on together: who has as many rows as one that was refused just before is refused with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vernier.errors import QueueFull
from vernier.serving.batching import Forecast, Limits
from vernier.serving.latency import ArrivalRate, LatencyCurve, Margin
from vernier.serving.request_queue import RequestQueue

#: Rows per second that fill every batch.
_CROWD = 1e12

#: When each slot should be free; idle ones: in the past.
FreeAt = Callable[[], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator asks for.

    Attributes:
        max_queue_delay_s, objective_s: see `vernier.serving.batching.Limits`.
        queue_limit: the most requests that wait.
        age_s: how much longer waiting outweighs one step of priority; also the patience of a request
            that has neither deadline nor objective.
    """

    max_queue_delay_s: float = 0.002
    objective_s: float | None = None
    queue_limit: int = 1024
    age_s: float = 1.0


class Asked(NamedTuple):
    """Requests that differ in their numbers and rows only. `rows`: of each. Times are on the caller's clock; they
    arrived after `earliest`, from when the objective counts."""

    rows: Sequence[int]
    priority: int
    deadline: float | None
    earliest: float


class Verdict(NamedTuple):
    """promised: by the number of each that is let in, when it is to be answered by; None where nothing was predicted.
    refusal: of the first of the others, for all of them; None when there are none."""

    promised: dict[int, float | None]
    refusal: QueueFull | None


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
        rows = asked.rows
        room = max(0, min(len(rows), self._policy.queue_limit - self._queue.requests))
        if asked.deadline is not None or self._policy.objective_s is not None:
            return self._promise(asked, room, curve, now, free_at)
        full = None if room == len(rows) else self._full(room, sum(rows[:room]), curve, now, free_at())
        return Verdict(dict.fromkeys(range(room)), full)

    def _promise(self, asked: Asked, room: int, curve: LatencyCurve, now: float, free_at: FreeAt) -> Verdict:
        """Lets in up to `room`, but none that should finish too late, unless it would start at once.

        When nothing stands before it, trying costs nobody anything, and a prediction that has become
        too high corrects itself instead of refusing everything for ever.
        """
        each, priority, deadline, earliest = asked
        objective_s, limits, rate = self._policy.objective_s, self._limits, self.rate.per_second(now)
        before = self._queue.rows_ahead(priority)
        ends = [
            at for at in (deadline, None if objective_s is None else earliest + objective_s) if at is not None
        ]
        limit = min(ends)
        forecast: Forecast | None = None
        refusal: QueueFull | None = None
        free: tuple[float, ...] = ()
        promised: dict[int, float | None] = {}
        entering = 0
        late: set[int] = set()  # rows of those that would finish too late, after those that were let in
        for at, rows in enumerate(each):
            if len(promised) == room:
                refusal = refusal or self._full(room, entering, curve, now, free or free_at())
                break
            if rows in late:
                continue
            ahead, waits = before + entering, False
            if objective_s is not None or not self._in_time_for_sure(entering + rows, curve, now, limit):
                free = free or free_at()
                waits = bool(ahead or (free and min(free) > now))
            if waits:
                forecast = forecast or Forecast(free, now, curve, rate, limits)
                finish = forecast.finish(rows, ahead)
                if finish + self.margin.seconds > limit:
                    late.add(rows)
                    if refusal is None:
                        crowded = Forecast(free, now, curve, _CROWD, limits).finish(rows, ahead)
                        refusal = self._too_late(finish, crowded, limit, now)
                    continue
            promised[at] = limit if waits else None
            late.clear()
            entering += rows
        return Verdict(promised, refusal)

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
            f"{self._queue.requests + entering} requests wait already; retry after the given time",
            drained - now,
        )

    def _in_time_for_sure(self, rows: int, curve: LatencyCurve, now: float, deadline: float) -> bool:
        """The quick answer for deadlines that are far away: one slot alone would meet this one.

        Args:
            rows: its own and those that come in with it.
        """
        # What runs, full batches before it, one for the remainder, and its own.
        batches = 3 + (self._queue.rows + rows) // self._limits.max_rows
        return now + batches * curve.worst_s <= deadline

    def answered(self, promised: float, arrived: float, now: float) -> None:
        """Learns from an answer whether it was right to let its request in."""
        self.margin.observe(now > promised, promised - arrived)
