"""Which requests are let into the queue: the bound on waiting rows, and the prediction of when an answer would come.

What a refusal stands on is not changed by refusing, so requests of one batch are decided on together, with the same
outcome as if they came one by one: of those with equal rows, the ones in front are let in, and the first one that is
refused speaks for those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vernier.errors import QueueFull
from vernier.serving.queueing.batching import Forecast, Limits
from vernier.serving.queueing.latency import ArrivalRate, LatencyCurve, Margin
from vernier.serving.queueing.request_queue import RequestQueue
from vernier.serving.queueing.span import runs

#: Rows per second that fill every batch.
_CROWD = 1e12

#: When each slot should be free; idle ones: in the past.
FreeAt = Callable[[], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator asks for.

    Attributes:
        max_queue_delay_s, objective_s: see `vernier.serving.queueing.batching.Limits`.
        queue_limit: the most rows that wait; a request of more rows is let in where nothing waits.
        age_s: how much longer waiting outweighs one step of priority; also the patience of a request
            that has neither deadline nor objective.
    """

    max_queue_delay_s: float = 0.002
    objective_s: float | None = None
    queue_limit: int = 8192
    age_s: float = 1.0


class AdmissionRequest(NamedTuple):
    """Requests that differ in their numbers and rows only. `rows`: of each. `deadline`: on the caller's clock."""

    rows: Sequence[int]
    priority: int
    deadline: float | None


class AdmissionDecision(NamedTuple):
    """admitted: the numbers of those that are let in, as runs. promised: by the number of each, by when it should be
    answered; None where nothing was predicted, or instead of all where nothing was predicted for any. refusal: of the
    first of the others, for all of them; None when there are none."""

    admitted: Sequence[range]
    promised: Sequence[float | None] | None
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

    def judge(
        self, wanted: AdmissionRequest, curve: LatencyCurve, now: float, free_at: FreeAt
    ) -> AdmissionDecision:
        """Which requests may wait. Nothing is queued and only the arrivals are counted.

        Args:
            curve: of the batch queue that they would wait in.
            free_at: asked only when a prediction is needed.
        """
        self.rate.add(wanted.rows[0])
        verdict = self._decide(wanted, curve, now, free_at)
        self.rate.add(sum(wanted.rows[1:]))
        return verdict

    def refusal(
        self, wanted: AdmissionRequest, curve: LatencyCurve, now: float, free_at: FreeAt
    ) -> QueueFull | None:
        """Why any of them would be refused now; None when none would. Nothing is counted."""
        return self._decide(wanted, curve, now, free_at).refusal

    def _decide(
        self, wanted: AdmissionRequest, curve: LatencyCurve, now: float, free_at: FreeAt
    ) -> AdmissionDecision:
        """One request after the other: lets in what finds room, but none that should be answered too late, unless it
        would start at once.

        When nothing stands before it, trying costs no other request anything, and a prediction that has become
        too high corrects itself instead of refusing everything for ever.
        """
        objective_s, queue_limit = self._policy.objective_s, self._policy.queue_limit
        ends = (wanted.deadline, None if objective_s is None else now + objective_s)
        limit = min([end for end in ends if end is not None], default=None)
        rate = 0.0 if limit is None else self.rate.per_second(now)
        total = sum(wanted.rows)
        if self._queue.rows + total <= queue_limit and (
            limit is None or (objective_s is None and self._in_time_for_sure(total, curve, now, limit))
        ):
            return AdmissionDecision((range(len(wanted.rows)),), None, None)
        waiting, before = self._queue.rows, self._queue.rows_ahead(wanted.priority)
        free: tuple[float, ...] = ()
        forecast: Forecast | None = None
        refusal: QueueFull | None = None
        promised: list[float | None] = [None] * len(wanted.rows)
        admitted: list[int] = []
        entering = 0
        hopeless: set[int] = set()  # rows of those that were refused after the last one that was let in
        for number, rows in enumerate(wanted.rows):
            if rows in hopeless:
                continue
            if waiting + entering + rows > queue_limit and waiting + entering:
                hopeless.add(rows)
                refusal = refusal or self._full(len(admitted), entering, curve, now, free or free_at())
                continue
            if limit is not None and (
                objective_s is not None or not self._in_time_for_sure(entering + rows, curve, now, limit)
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
        return AdmissionDecision(runs(admitted), promised if any(promised) else None, refusal)

    def _too_late(self, finish: float, crowded: float, limit: float, now: float) -> QueueFull:
        """A request that is sent again comes with others, and a tenth later, or it would stand on the edge again."""
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

    def _in_time_for_sure(self, rows: int, curve: LatencyCurve, now: float, deadline: float) -> bool:
        """The quick answer for deadlines that are far away: whether one slot alone would answer a request in time whose
        last row is the `rows`-th of those that come in now."""
        # What runs, full batches before it, one for the remainder, and its own.
        batches = 3 + (self._queue.rows + rows) // self._limits.max_rows
        return now + batches * curve.worst_s <= deadline

    def answered(self, promised: float, arrived: float, now: float, count: int) -> None:
        """Learns from answers to `count` requests whether it was right to let them in."""
        self.margin.observe(now > promised, promised - arrived, count)
