"""The waiting requests, in the order in which they should run. No clock, no thread, no loop.

Requests that can share an execution (one variant, one shape) wait in one lane, as spans of their batches. Inside a
priority the earliest due time goes first: the deadline, or for a request without one its arrival plus a patience, so
that it cannot be overtaken for ever. Between priorities a step is worth `age_s` of waiting: a request that
has waited that much longer than the head of the next higher priority goes before it.

Spans mostly come in the order in which they are due, so each order is a deque with a heap beside it
for the stragglers. A span that leaves early stays in its deque as a tombstone, told by its `level`,
until it surfaces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count

from vernier.serving.padding import ShapeKey
from vernier.serving.span import Part, Span

LaneKey = tuple[str, ShapeKey, bool]

#: Tombstones in a level beyond the living and this many are swept.
_SWEEP = 256


class PriorityLevel:
    """The spans of one priority in one lane, by due time."""

    __slots__ = ("_heap", "_line", "_ticket", "_undated", "entered", "living")

    def __init__(self) -> None:
        self._undated: deque[Span] = deque()  # no deadline: due in the order of arrival
        self._line: deque[Span] = deque()  # deadlines that came in ascending order
        self._heap: list[tuple[float, int, Span]] = []
        self._ticket = count()
        self.living = 0
        self.entered = 0

    def push(self, span: Span) -> None:
        line = self._undated if span.deadline is None else self._line
        if not line or line[-1].due <= span.due:
            line.append(span)
        else:
            heappush(self._heap, (span.due, next(self._ticket), span))
        self.living += 1
        self.entered += 1
        self._keep_small()

    def head(self) -> Span | None:
        """The span that is due first; None when the level is empty."""
        best = None
        for line in (self._undated, self._line):
            while line and line[0].level is not self:
                line.popleft()
                self.entered -= 1
            if line and (best is None or line[0].due < best.due):
                best = line[0]
        heap = self._heap
        if heap:
            while heap and heap[0][2].level is not self:
                heappop(heap)
                self.entered -= 1
            if heap and (best is None or heap[0][0] < best.due):
                best = heap[0][2]
        return best

    def only_line(self) -> deque[Span] | None:
        """The deque that holds all spans, where a single one does."""
        if self._heap or (self._undated and self._line):
            return None
        return self._undated or self._line

    def next_due(self) -> float | None:
        """The earliest due time of a living span with deadlines; None when none has any."""
        self.head()
        found = [self._line[0].due] if self._line else []
        if self._heap:
            if self._heap[0][2].deadline is not None:
                found.append(self._heap[0][0])
            else:
                found += [due for due, _, s in self._heap if s.deadline is not None and s.level is self]
        return min(found, default=None)

    def overdue(self, now: float) -> Iterator[Span]:
        """Every living span with deadlines that was due."""
        for span in self._line:
            if span.due > now:
                break
            if span.level is self:
                yield span
        if self._heap and self._heap[0][0] <= now:
            for due, _, span in self._heap:
                if span.level is self and span.deadline is not None and due <= now:
                    yield span

    def __iter__(self) -> Iterator[Span]:
        for span in (*self._undated, *self._line, *[entry[2] for entry in self._heap]):
            if span.level is self:
                yield span

    def oldest(self) -> float:
        """Arrival of the span that has waited longest; only undated ones stand in that order."""
        self.head()
        times = [self._undated[0].arrived] if self._undated else []
        if self._line:
            times += [s.arrived for s in self._line if s.level is self]
        if self._heap:
            times += [s.arrived for _, _, s in self._heap if s.level is self]
        return min(times)

    def _keep_small(self) -> None:
        if self.entered <= 2 * self.living + _SWEEP:
            return
        self._undated = deque(s for s in self._undated if s.level is self)
        self._line = deque(s for s in self._line if s.level is self)
        self._heap = sorted(entry for entry in self._heap if entry[2].level is self)
        self.entered = self.living


class Lane:
    """Spans whose requests can share an execution."""

    __slots__ = ("alone", "key", "levels", "precision", "requests", "rows", "shape")

    def __init__(self, key: LaneKey) -> None:
        self.key = key
        self.precision, self.shape, self.alone = key
        self.levels: dict[int, PriorityLevel] = {}
        self.rows = 0
        self.requests = 0

    def oldest(self) -> float:
        """Arrival of the request that has waited longest."""
        return min(level.oldest() for level in self.levels.values())


class RequestQueue:
    """Every waiting request of one model version.

    Args:
        age_s: how much longer waiting outweighs one step of priority.
        largest: rows of the largest execution.

    Attributes:
        requests, rows: how many wait.
    """

    def __init__(self, age_s: float, largest: int) -> None:
        self._age_s = age_s
        self._largest = largest
        self._rows_of: dict[int, int] = {}  # by priority
        self.lanes: dict[LaneKey, Lane] = {}
        self.requests = 0
        self.rows = 0

    # --- in ---------------------------------------------------------------------------------------
    def push(self, span: Span, key: LaneKey) -> None:
        """Has a span wait that was in no queue before."""
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(key)
        priority = span.priority
        level = lane.levels.get(priority)
        if level is None:
            level = lane.levels[priority] = PriorityLevel()
        span.lane = lane
        span.level = level
        span.batch.state.waiting.append(span)
        level.push(span)
        requests, rows = span.stop - span.start, span.rows
        lane.requests += requests
        lane.rows += rows
        self.requests += requests
        self.rows += rows
        self._rows_of[priority] = self._rows_of.get(priority, 0) + rows

    # --- out, early -------------------------------------------------------------------------------
    def remove(self, span: Span) -> None:
        """Takes a waiting span out; see `Span.batch`."""
        lane = span.lane
        assert lane is not None
        self._stand_down(span)
        del span.batch
        self._left(lane, span.priority, 1, span.stop - span.start, span.rows - span.taken)

    def withdraw(self, span: Span, request: int) -> None:
        """Takes one request out of a waiting span; the others keep their place, or stand where it was."""
        start, stop = span.start, span.stop
        if stop - start == 1:
            self.remove(span)
            return
        lane, rows = span.lane, span.rows
        assert lane is not None
        rest = None
        if request == start:
            span.narrow(start + 1, stop)
        else:
            if request + 1 < stop:
                rest = span.part(request + 1, stop, self._largest)
            span.narrow(start, request)
        self._left(lane, span.priority, 0, stop - start - len(span), rows - span.rows)
        if rest is not None:
            self.push(rest, lane.key)

    def _stand_down(self, span: Span) -> None:
        span.level = None
        span.batch.state.waiting.remove(span)

    def _left(self, lane: Lane, priority: int, spans: int, requests: int, rows: int) -> None:
        level = lane.levels[priority]
        level.living -= spans
        if level.living == 0:
            del lane.levels[priority]
        lane.requests -= requests
        lane.rows -= rows
        if lane.requests == 0:
            del self.lanes[lane.key]
        self.requests -= requests
        self.rows -= rows
        self._rows_of[priority] -= rows
        if not self._rows_of[priority]:
            del self._rows_of[priority]

    # --- the order --------------------------------------------------------------------------------
    def rows_ahead(self, priority: int) -> int:
        """Rows that go before a new request of this priority, ageing aside."""
        if len(self._rows_of) <= 1:
            return self.rows if priority in self._rows_of or priority < next(iter(self._rows_of), 0) else 0
        return sum(rows for other, rows in self._rows_of.items() if other >= priority)

    def by_urgency(self, now: float) -> list[Lane]:
        """The lanes, the one whose head should run first in front."""
        if len(self.lanes) <= 1:
            return list(self.lanes.values())
        heads = {lane: self.head(lane, now) for lane in self.lanes.values()}
        leaders: dict[int, Span] = {}
        for head in heads.values():
            leader = leaders.get(head.priority)
            if leader is None or head.due < leader.due:
                leaders[head.priority] = head

        def urgency(lane: Lane) -> tuple[float, float]:
            head = heads[lane]
            return -self._score(leaders[head.priority], now), head.due

        # Lanes of one priority go by due time; priorities among themselves by their leaders' ages.
        return sorted(heads, key=urgency)

    def _score(self, head: Span, now: float) -> float:
        return head.priority + (now - head.arrived) / self._age_s

    def _best(self, lane: Lane, now: float) -> Span | None:
        """The span that the lane should run next."""
        best: Span | None = None
        score = 0.0
        for level in lane.levels.values():
            head = level.head()
            if head is not None:
                own = self._score(head, now)
                if best is None or own > score:
                    best, score = head, own
        return best

    def head(self, lane: Lane, now: float) -> Span:
        """The span that the lane should run next."""
        best = self._best(lane, now)
        assert best is not None
        return best

    def overdue(self, now: float) -> list[Span]:
        """Every waiting span with deadlines that was due."""
        found: list[Span] = []
        for lane in self.lanes.values():
            for level in lane.levels.values():
                found += level.overdue(now)
        return found

    def next_due(self) -> float | None:
        """When `overdue` may find something; None while no waiting request has a deadline."""
        times = [level.next_due() for lane in self.lanes.values() for level in lane.levels.values()]
        return min((t for t in times if t is not None), default=None)

    def __iter__(self) -> Iterator[Span]:
        for lane in list(self.lanes.values()):
            for level in list(lane.levels.values()):
                yield from level

    # --- out, to run ------------------------------------------------------------------------------
    def take(self, lane: Lane, room: int, now: float) -> list[Part]:
        """Takes requests in order until `room` rows are full or the next request does not fit.

        A request of more rows than the largest execution gives as many as there is room for and keeps its place;
        others are taken whole, the first one even when it has more than `room` rows.
        """
        parts: list[Part] = []
        if len(lane.levels) == 1 and not lane.alone:
            room -= self._take_line(lane, room, parts)
        while room > 0:
            span = self._best(lane, now)
            if span is None:
                break
            left = span.rows - span.taken
            if span.gather is not None:
                part = self._take_rows(lane, span, min(left, room))
            elif left <= room:
                part = self._take_whole(lane, span)
            else:
                fit = span.fitting(room) or (0 if parts else 1)
                if not fit:
                    break
                part = self._take_front(lane, span, fit)
                room = 0  # the next request does not fit
            parts.append(part)
            room -= part.rows
            if lane.alone:
                break
        return parts

    def _take_rows(self, lane: Lane, span: Span, rows: int) -> Part:
        part = Part(span.batch, span, span.first + span.taken, rows)
        span.taken += rows
        over = int(span.taken == span.rows)
        if over:
            self._stand_down(span)
        self._left(lane, span.priority, over, over, rows)
        return part

    def _take_whole(self, lane: Lane, span: Span) -> Part:
        self._stand_down(span)
        self._left(lane, span.priority, 1, span.stop - span.start, span.rows)
        return Part(span.batch, span, span.first, span.rows)

    def _take_front(self, lane: Lane, span: Span, count: int) -> Part:
        """The first `count` requests of a span; the others keep its place."""
        if count == span.stop - span.start:
            return self._take_whole(lane, span)
        front = span.part(span.start, span.start + count, self._largest)
        front.due = span.due
        span.narrow(front.stop, span.stop)
        self._left(lane, span.priority, 0, count, front.rows)
        return Part(front.batch, front, front.first, front.rows)

    def _take_line(self, lane: Lane, room: int, parts: list[Part]) -> int:
        """The quick way where one line holds all: whole spans from its front. Returns their rows."""
        ((priority, level),) = lane.levels.items()
        line = level.only_line()
        if line is None:
            return 0
        entered = len(line)
        requests = rows = 0
        while line:
            span = line[0]
            if span.level is level:
                taken = span.taken
                more = span.rows - taken
                if rows + more > room:
                    break
                requests += span.stop - span.start
                rows += more
                span.taken = span.rows if taken else 0
                self._stand_down(span)
                parts.append(Part(span.batch, span, span.first + taken, more))
            line.popleft()
        level.entered -= entered - len(line)
        if parts:
            self._left(lane, priority, len(parts), requests, rows)
        return rows
