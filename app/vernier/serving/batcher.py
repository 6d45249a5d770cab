"""The queue, the estimates and the policy of one model version, without clock, threads or loop.

The scheduler drives it in real time; the simulator and the property tests in virtual time. Whatever
is decided about requests (who runs with whom, when, who is dropped) is decided here, but for who is let in
(`admission.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from vernier.errors import QueueFull
from vernier.serving.admission import Admission, Asked, FreeAt, Policy
from vernier.serving.batching import (
    IDLE,
    Decide,
    Decision,
    Dispatch,
    Limits,
    Slots,
    Waiting,
    batch_cap,
    decide,
)
from vernier.serving.execution import Batch
from vernier.serving.latency import LatencyCurve
from vernier.serving.padding import BatchLayout, Gather, ShapeKey
from vernier.serving.request import ENDED, QUEUED, RUNNING, PendingRequest, RequestGroup, start_again
from vernier.serving.request_queue import Lane, RequestQueue

#: Shapes with a latency curve of their own; models without sequence buckets may see any number.
_MOST_CURVES = 64


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
        self.admission = Admission(policy, self.limits, self.queue)
        self.rate = self.admission.rate
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
    def admit(
        self, request: PendingRequest, now: float, free_at: FreeAt, earliest: float | None = None
    ) -> QueueFull | None:
        """Puts a request into the queue, or as many of a group as may wait: the others are not in it any more.

        Args:
            free_at: when each slot should be free.
            earliest: when it may have arrived, if that was before now.

        Returns why it was not admitted, or others of the group were not: too many wait, or they could not be
        answered in time. None when all were. It is not raised: its traceback would keep the request.
        """
        group = request if isinstance(request, RequestGroup) else None
        each = (request.rows,) if group is None else group.each
        precision = request.precision or self.precision
        shape = self.layout.shape_key(request.inputs)
        since = now if earliest is None else earliest
        asked = Asked(each, request.priority, request.deadline, since)
        promised, refusal = self.admission.judge(asked, self.curve(precision, shape), now, free_at)
        if group is not None:
            if refusal is not None:
                group.keep(tuple(promised))
            group.promises = list(promised.values())
        if promised:
            request.arrived = now
            request.due = now + self._patience_s if request.deadline is None else request.deadline
            request.shape = shape
            *_, request.promised = promised.values()  # of a group: None only where none of them has one
            if group is None and request.rows > self.layout.largest:
                request.gather = Gather(request.rows)
            self.queue.push(request, (precision, shape, False))
        return refusal

    def refusal(
        self,
        precision: str | None,
        priority: int,
        deadline: float | None,
        now: float,
        free_at: FreeAt,
        earliest: float | None = None,
    ) -> QueueFull | None:
        """Why a request that has not been read would be refused, had it one row; None when that depends on its shape,
        and when it would be admitted."""
        if self.layout.dims:
            return None
        asked = Asked((1,), priority, deadline, now if earliest is None else earliest)
        return self.admission.refusal(asked, self.curve(precision or self.precision, ()), now, free_at)

    def answered(self, request: PendingRequest, now: float) -> None:
        """Learns from an answer whether its prediction was right, if there was one."""
        for promised in request.promises if isinstance(request, RequestGroup) else (request.promised,):
            if promised is not None:
                self.admission.answered(promised, request.arrived, now)

    def again(self, request: PendingRequest, now: float) -> None:
        """Puts back a request that must be computed anew; it keeps its arrival and its due time."""
        if request.state == QUEUED:  # part of a split request waits still
            self.queue.remove(request, ENDED)
        start_again(request)
        if request.rows > self.layout.largest:
            request.gather = Gather(request.rows)
        precision = request.rescue or request.precision or self.precision
        self.queue.push(request, (precision, request.shape, request.alone))

    # --- out --------------------------------------------------------------------------------------
    def single_out(self, request: PendingRequest) -> None:
        """Makes a request that is in a group one of its own, and with it all of the group if that waits."""
        group = request.group
        if group is not None and group.state == QUEUED:
            self.queue.dissolve(group)
        elif group is not None and group.state == RUNNING:
            group.release(request)

    def discard(self, request: PendingRequest) -> None:
        """Ends a request wherever it stands; what runs of it is computed for nobody."""
        if request.state == QUEUED:
            self.queue.remove(request, ENDED)
        request.state = ENDED

    def overdue(self, now: float) -> list[PendingRequest]:
        """Waiting requests whose deadline has come."""
        found = self.queue.overdue(now)
        groups = [request for request in found if isinstance(request, RequestGroup)]
        for group in groups:
            if group.state == QUEUED:  # one that came back to its lane is met twice there
                self.queue.dissolve(group)
        return self.queue.overdue(now) if groups else found

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
        late = now + self.curve(lane.precision, lane.shape).seconds(self._needs(head)) > head.deadline
        if late and isinstance(head, RequestGroup):
            self.queue.dissolve(head)
            return self._hopeless(lane, now)
        return head if late else None

    def _needs(self, request: PendingRequest) -> int:
        """Rows that a request needs in one execution; of a group, the first of its requests."""
        if isinstance(request, RequestGroup):
            return request.each[0]
        return min(request.rows - request.taken, self.layout.largest)

    def _decide_lane(self, lane: Lane, now: float, slots: Slots) -> Decision:
        if lane.alone:
            return Dispatch(self.layout.largest, IDLE)
        head = self.queue.head(lane, now)
        due: float | None = head.due
        if head.deadline is None and self.policy.objective_s is None:
            due = None
        waiting = Waiting(lane.rows, self._needs(head), lane.oldest(), due)
        curve = self.curve(lane.precision, lane.shape)
        return self._decide(waiting, now, slots, curve, self.rate.per_second(now), self.limits)

    def _head_rows(self, lane: Lane, now: float) -> int:
        """Rows that the lane's next request needs in one execution."""
        return self._needs(self.queue.head(lane, now))

    def fills_batch(self, slots: int) -> bool:
        """Whether what waits is as much as the largest batch that the objective allows on so many slots."""
        cap = batch_cap(self.curve(self.precision, self.layout.typical), self.limits, slots)
        return self.queue.rows >= cap

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
