"""The queue, the estimates and the policy of one model version, without clock, threads or loop.

The scheduler drives it in real time; the simulator and the property tests in virtual time. Whatever
is decided about requests (who is admitted, who runs with whom, when, who is dropped) is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.errors import QueueFull
from app.serving.batching import (
    IDLE,
    Backlog,
    Decide,
    Decision,
    Dispatch,
    Limits,
    Slots,
    Waiting,
    decide,
    predict_finish,
)
from app.serving.execution import Batch
from app.serving.latency import ArrivalRate, LatencyCurve, Lateness
from app.serving.padding import BatchLayout, Gather, ShapeKey
from app.serving.queue import Lane, RequestQueue
from app.serving.request import ENDED, QUEUED, RUNNING, PendingRequest, start_again

#: Shapes with a latency curve of their own; models without sequence buckets may see any number.
_MOST_CURVES = 64
#: Rows per second that fill every batch.
_CROWD = 1e12


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator asks for.

    Attributes:
        max_queue_delay_s, objective_s: see `app.serving.batching.Limits`.
        queue_limit: the most requests that wait.
        age_s: how much longer waiting outweighs one step of priority; also the patience of a request
            that has neither deadline nor objective.
    """

    max_queue_delay_s: float = 0.002
    objective_s: float | None = None
    queue_limit: int = 1024
    age_s: float = 1.0


class Choice(NamedTuple):
    """Up to `rows` rows of a lane, to run now. inline: on the caller's own thread."""

    lane: Lane
    rows: int
    reason: str
    inline: bool


InlineRows = Callable[[Lane, float], int]


class Batcher:
    """Belongs to one thread.

    Args:
        exact: precision → whether batches of that variant need no padding.
        curves: precision → bucket → seconds, as measured before.
        precision: the variant that requests take unless they demand another.
        decide: the policy; another one only to compare it with.
    """

    def __init__(
        self,
        layout: BatchLayout,
        exact: Mapping[str, bool],
        precision: str,
        policy: Policy,
        curves: Mapping[str, Mapping[int, float]] | None = None,
        decide: Decide = decide,
    ) -> None:
        self._decide = decide
        self.layout = layout
        self.policy = policy
        self.precision = precision
        self.queue = RequestQueue(policy.age_s)
        self.limits = Limits(layout.largest, policy.max_queue_delay_s, policy.objective_s)
        self.rate = ArrivalRate()
        self.lateness = Lateness()
        self._patience_s = policy.objective_s if policy.objective_s is not None else policy.age_s
        self._curves: dict[tuple[str, ShapeKey | None], LatencyCurve] = {}
        for name, is_exact in exact.items():
            self.learn_variant(name, is_exact, (curves or {}).get(name))

    def learn_variant(self, precision: str, exact: bool, seconds: Mapping[int, float] | None = None) -> None:
        """A variant that batches may take from now on, or a new executor of a known one."""
        exact = exact and self.layout.kind == "dynamic"
        for key in [key for key in self._curves if key[0] == precision]:
            del self._curves[key]
        self._curves[precision, None] = LatencyCurve(self.layout.buckets, exact, seconds)

    def curve(self, precision: str, shape: ShapeKey) -> LatencyCurve:
        """The latency curve of a lane."""
        layout = self.layout
        key = (precision, shape if layout.dims else None)
        found = self._curves.get(key)
        if found is None:
            base = self._curves[precision, None]
            if len(self._curves) >= _MOST_CURVES:
                return base
            found = base.copy(layout.weight(shape) / layout.weight(layout.typical))
            self._curves[key] = found
        return found

    # --- in ---------------------------------------------------------------------------------------
    def admit(self, request: PendingRequest, now: float, free_at: Callable[[], tuple[float, ...]]) -> None:
        """Puts a request into the queue.

        Args:
            free_at: when each slot should be free; asked only when a prediction is needed.

        Raises:
            QueueFull: too many wait, or it could not be answered in time.
        """
        queue, policy = self.queue, self.policy
        self.rate.add(request.rows)
        request.arrived = now
        precision = request.precision or self.precision
        shape = self.layout.shape_key(request.inputs)
        request.shape = shape
        deadline = request.deadline
        if queue.requests >= policy.queue_limit:
            raise QueueFull(
                f"{queue.requests} requests wait already; retry after the given time",
                self._drain_s(precision, shape, free_at(), now),
            )
        if deadline is not None:
            request.due = deadline
            self._require_time(request, precision, shape, now, free_at)
        else:
            request.due = now + self._patience_s
            if policy.objective_s is not None:
                self._require_time(request, precision, shape, now, free_at)
        if request.rows > self.layout.largest:
            request.gather = Gather(request.rows)
        queue.push(request, (precision, shape, False))

    def admit_alike(self, requests: Sequence[PendingRequest], now: float) -> bool:
        """`admit` for requests that differ in their numbers only; False, with nothing done, where each
        must be looked at: when one may have to be refused, or must be split."""
        queue, policy, first = self.queue, self.policy, requests[0]
        if (
            first.deadline is not None
            or policy.objective_s is not None
            or first.rows > self.layout.largest
            or queue.requests + len(requests) > policy.queue_limit
        ):
            return False
        shape = self.layout.shape_key(first.inputs)
        due = now + self._patience_s
        for request in requests:
            request.arrived = now
            request.due = due
            request.shape = shape
        self.rate.add(first.rows * len(requests))
        queue.push_alike(requests, (first.precision or self.precision, shape, False))
        return True

    def _require_time(
        self,
        request: PendingRequest,
        precision: str,
        shape: ShapeKey,
        now: float,
        free_at: Callable[[], tuple[float, ...]],
    ) -> None:
        """Refuses what should finish too late, unless it would start at once.

        When nothing stands before it, trying costs nobody anything, and a prediction that has become
        too high corrects itself instead of refusing everything for ever.
        """
        curve = self.curve(precision, shape)
        if self._in_time_for_sure(request, curve, now):
            return
        free = free_at()
        rows_ahead = self.queue.rows_ahead(request.priority)
        if not rows_ahead and (not free or min(free) <= now):
            return
        limit = now + self.policy.objective_s if self.policy.objective_s is not None else None
        if request.deadline is not None:
            limit = request.deadline if limit is None else min(limit, request.deadline)
        backlog = Backlog(rows_ahead, free)
        finish = predict_finish(request.rows, backlog, now, curve, self.rate.per_second(now), self.limits)
        request.promised = finish
        finish += self.lateness.seconds
        if limit is not None and finish > limit:
            # Who comes back comes with others, and a tenth later, or it would stand on the edge again.
            crowded = predict_finish(request.rows, backlog, now, curve, _CROWD, self.limits)
            crowded += self.lateness.seconds
            raise QueueFull(
                f"the answer would take {1e3 * (finish - now):.3g} ms, which is more than the "
                f"{1e3 * (limit - now):.3g} ms allowed; retry after the given time, or allow more",
                crowded - limit + 0.1 * (crowded - now),
            )

    def answered(self, request: PendingRequest, now: float) -> None:
        """Learns from an answer how right its prediction was, if there was one."""
        objective_s, deadline = self.policy.objective_s, request.deadline
        allowed_s = objective_s if objective_s is not None else (deadline or 0.0) - request.arrived
        if request.promised is not None and allowed_s > 0:
            self.lateness.observe(now - request.promised, allowed_s)

    def _in_time_for_sure(self, request: PendingRequest, curve: LatencyCurve, now: float) -> bool:
        """The quick answer for deadlines that are far away: one slot alone would meet this one."""
        if self.policy.objective_s is not None or request.deadline is None:
            return False
        largest = self.layout.largest
        # What runs, full batches before it, one for the remainder, and its own.
        batches = 3 + (self.queue.rows + request.rows) // largest
        return now + batches * curve.worst_s <= request.deadline

    def _drain_s(self, precision: str, shape: ShapeKey, free: tuple[float, ...], now: float) -> float:
        """Seconds until everything that waits should be done."""
        curve = self.curve(precision, shape)
        return predict_finish(1, Backlog(self.queue.rows, free), now, curve, 0.0, self.limits) - now

    def again(self, request: PendingRequest, now: float) -> None:
        """Puts back a request that must be computed anew; it keeps its arrival and its due time."""
        start_again(request)
        if request.state == QUEUED:  # part of a split request waits still
            self.queue.remove(request, ENDED)
        if request.rows > self.layout.largest:
            request.gather = Gather(request.rows)
        precision = request.rescue or request.precision or self.precision
        self.queue.push(request, (precision, request.shape, request.alone))

    # --- out --------------------------------------------------------------------------------------
    def discard(self, request: PendingRequest) -> None:
        """Ends a request wherever it stands; what runs of it is computed for nobody."""
        if request.state == QUEUED:
            self.queue.remove(request, ENDED)
        request.state = ENDED

    def overdue(self, now: float) -> list[PendingRequest]:
        """Waiting requests whose deadline has come."""
        return self.queue.overdue(now)

    def choose(
        self,
        now: float,
        slots: Callable[[], Slots],
        late: list[PendingRequest],
        inline_rows: InlineRows | None = None,
    ) -> tuple[Choice | None, float | None]:
        """What should run next, if anything should run now.

        Args:
            slots: tells of the slots; asked only when nothing can run inline.
            late: gets the requests that cannot meet their deadline any more; they are out of the queue.
            inline_rows: how many rows of a lane the caller would run on its own thread, needing no slot.

        Returns:
            The choice, or None; and when a lane that waits for more wants to be asked again, or None.
        """
        wake: float | None = None
        known: Slots | None = None
        for lane in self.queue.by_urgency(now):
            while (request := self._hopeless(lane, now)) is not None:
                self.queue.remove(request, RUNNING)
                late.append(request)
            if inline_rows is not None:
                rows = inline_rows(lane, now)
                if rows and self._head_rows(lane, now) <= rows:
                    return Choice(lane, rows, IDLE, True), None
            known = known or slots()
            if known.idle:
                decision = self._decide_lane(lane, now, known)
                if isinstance(decision, Dispatch):
                    return Choice(lane, decision.rows, decision.reason, False), None
                wake = decision.until if wake is None else min(wake, decision.until)
        return None, wake

    def _hopeless(self, lane: Lane, now: float) -> PendingRequest | None:
        """The lane's next request if it cannot meet its deadline any more and others wait behind it."""
        if lane.requests < 2:
            return None
        head = self.queue.head(lane, now)
        if head.deadline is None or head.taken:
            return None
        rows = min(head.rows, self.layout.largest)
        late = now + self.curve(lane.precision, lane.shape).seconds(rows) > head.deadline
        return head if late else None

    def _decide_lane(self, lane: Lane, now: float, slots: Slots) -> Decision:
        if lane.alone:
            return Dispatch(self.layout.largest, IDLE)
        head = self.queue.head(lane, now)
        due: float | None = head.due
        if head.deadline is None and self.policy.objective_s is None:
            due = None
        waiting = Waiting(lane.rows, min(head.rows - head.taken, self.layout.largest), lane.oldest(), due)
        curve = self.curve(lane.precision, lane.shape)
        return self._decide(waiting, now, slots, curve, self.rate.per_second(now), self.limits)

    def _head_rows(self, lane: Lane, now: float) -> int:
        """Rows that the lane's next request needs in one execution."""
        head = self.queue.head(lane, now)
        return min(head.rows - head.taken, self.layout.largest)

    def predicted_s(self, choice: Choice) -> float:
        """How long the choice should take a slot."""
        lane = choice.lane
        return self.curve(lane.precision, lane.shape).seconds(min(choice.rows, lane.rows))

    def take(self, choice: Choice, now: float) -> Batch:
        """Takes the chosen requests out of the queue."""
        lane, room, reason, _ = choice
        parts = self.queue.take(lane, room, self.layout.largest, now)
        rows = 0
        for part in parts:
            rows += part[2]
        curve = self.curve(lane.precision, lane.shape)
        return Batch(self.layout, lane, parts, rows, curve.bucket(rows), reason, curve.seconds(rows), now)

    def ran(self, batch: Batch, seconds: float) -> None:
        """Learns how long a slot was taken by a batch."""
        self.curve(batch.precision, batch.shape).observe(batch.rows, seconds)

    # --- variants ---------------------------------------------------------------------------------
    def set_precision(self, precision: str) -> None:
        """New batches take this variant; requests that demanded one keep theirs."""
        self.precision = precision
        for request in list(self.queue):
            lane = request.lane
            assert lane is not None
            free = request.precision is None and request.rescue is None
            if free and lane.precision != precision and not request.taken:
                self.queue.remove(request, ENDED)
                self.queue.push(request, (precision, request.shape, request.alone))
