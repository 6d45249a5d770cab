"""The waiting requests, in the order in which they should run. No clock, no thread, no loop.

Requests that can share a batch (one variant, one shape) wait in one lane. Inside a priority the earliest
due time goes first: the deadline, or for a request without one its arrival plus a patience, so
that it cannot be overtaken for ever. Between priorities a step is worth `age_s` of waiting: a request that
has waited that much longer than the head of the next higher priority goes before it.

Requests mostly come in the order in which they are due, so each order is a deque with a heap beside it
for the stragglers. A request that leaves early stays in its deque as a tombstone, told by its `level`,
until it surfaces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count

from vernier.serving.padding import Part, ShapeKey
from vernier.serving.request import QUEUED, RUNNING, PendingRequest, RequestGroup

LaneKey = tuple[str, ShapeKey, bool]

#: Tombstones in a level beyond the living and this many are swept.
_SWEEP = 256


class Level:
    """One priority of one lane, by due time."""

    __slots__ = ("_heap", "_line", "_ticket", "_undated", "entered", "living")

    def __init__(self) -> None:
        self._undated: deque[PendingRequest] = deque()  # no deadline: due in the order of arrival
        self._line: deque[PendingRequest] = deque()  # deadlines that came in ascending order
        self._heap: list[tuple[float, int, PendingRequest]] = []
        self._ticket = count()
        self.living = 0
        self.entered = 0

    def push(self, request: PendingRequest) -> None:
        line = self._undated if request.deadline is None else self._line
        if not line or line[-1].due <= request.due:
            line.append(request)
        else:
            heappush(self._heap, (request.due, next(self._ticket), request))
        self.living += 1
        self.entered += 1
        self._keep_small()

    def head(self) -> PendingRequest | None:
        """The request that is due first; None when the level is empty."""
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

    def only_line(self) -> deque[PendingRequest] | None:
        """The deque that holds all requests, where a single one does."""
        if self._heap or (self._undated and self._line):
            return None
        return self._undated or self._line

    def next_deadline(self) -> float | None:
        """The earliest deadline of a living request; None when none has one."""
        self.head()
        found = [self._line[0].due] if self._line else []
        if self._heap:
            if self._heap[0][2].deadline is not None:
                found.append(self._heap[0][0])
            else:
                found += [due for due, _, r in self._heap if r.deadline is not None and r.level is self]
        return min(found, default=None)

    def overdue(self, now: float) -> Iterator[PendingRequest]:
        """Every living request whose deadline has come."""
        for request in self._line:
            if request.due > now:
                break
            if request.level is self:
                yield request
        if self._heap and self._heap[0][0] <= now:
            for due, _, request in self._heap:
                if request.level is self and request.deadline is not None and due <= now:
                    yield request

    def __iter__(self) -> Iterator[PendingRequest]:
        for request in (*self._undated, *self._line, *[entry[2] for entry in self._heap]):
            if request.level is self:
                yield request

    def oldest(self) -> float:
        """Arrival of the request that has waited longest; only undated ones stand in that order."""
        self.head()
        times = [self._undated[0].arrived] if self._undated else []
        if self._line:
            times += [r.arrived for r in self._line if r.level is self]
        if self._heap:
            times += [r.arrived for _, _, r in self._heap if r.level is self]
        return min(times)

    def _keep_small(self) -> None:
        if self.entered <= 2 * self.living + _SWEEP:
            return
        self._undated = deque(r for r in self._undated if r.level is self)
        self._line = deque(r for r in self._line if r.level is self)
        self._heap = sorted(entry for entry in self._heap if entry[2].level is self)
        self.entered = self.living


class Lane:
    """Requests that can share a batch."""

    __slots__ = ("alone", "key", "levels", "precision", "requests", "rows", "shape")

    def __init__(self, key: LaneKey) -> None:
        self.key = key
        self.precision, self.shape, self.alone = key
        self.levels: dict[int, Level] = {}
        self.rows = 0
        self.requests = 0

    def oldest(self) -> float:
        """Arrival of the request that has waited longest."""
        return min(level.oldest() for level in self.levels.values())


class RequestQueue:
    """Every waiting request of one model version. A group stands in one place, and counts as its requests.

    Args:
        age_s: how much longer waiting outweighs one step of priority.
    """

    def __init__(self, age_s: float) -> None:
        self._age_s = age_s
        self._rows_of: dict[int, int] = {}  # by priority
        self.lanes: dict[LaneKey, Lane] = {}
        self.requests = 0
        self.rows = 0

    def push(self, request: PendingRequest, key: LaneKey) -> None:
        """`arrived`, `due` and `deadline` are set; with a deadline, `due` equals it."""
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(key)
        level = lane.levels.get(request.priority)
        if level is None:
            level = lane.levels[request.priority] = Level()
        request.state = QUEUED
        request.lane = lane
        request.level = level
        level.push(request)
        self._came(lane, request.priority, request.count, request.rows - request.taken)

    def _came(self, lane: Lane, priority: int, requests: int, rows: int) -> None:
        lane.requests += requests
        lane.rows += rows
        self.requests += requests
        self.rows += rows
        self._rows_of[priority] = self._rows_of.get(priority, 0) + rows

    def remove(self, request: PendingRequest, state: int) -> None:
        """Takes a waiting request out of all counts and gives it `state`."""
        lane = request.lane
        assert lane is not None
        request.state = state
        request.level = None
        self._left(lane, request.priority, 1, request.count, request.rows - request.taken)

    def dissolve(self, group: RequestGroup) -> None:
        """Has the requests of a group that waits wait each for itself."""
        lane, count, rows = group.lane, group.count, group.rows
        assert lane is not None
        for request in group.dissolve():
            self.push(request, lane.key)
        group.level = None
        self._left(lane, group.priority, 1, count, rows)

    def _left(self, lane: Lane, priority: int, places: int, requests: int, rows: int) -> None:
        level = lane.levels[priority]
        level.living -= places
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

    def rows_ahead(self, priority: int) -> int:
        """Rows that go before a new request of this priority, ageing aside."""
        if len(self._rows_of) <= 1:
            return self.rows if priority in self._rows_of or priority < next(iter(self._rows_of), 0) else 0
        return sum(rows for other, rows in self._rows_of.items() if other >= priority)

    def by_urgency(self, now: float) -> list[Lane]:
        """The lanes, the one whose head should run first in front."""
        if len(self.lanes) <= 1:
            return list(self.lanes.values())
        heads: dict[Lane, tuple[int, PendingRequest]] = {}
        leaders: dict[int, PendingRequest] = {}
        for lane in self.lanes.values():
            best = self._best(lane, now)
            assert best is not None
            heads[lane] = best
            leader = leaders.get(best[0])
            if leader is None or best[1].due < leader.due:
                leaders[best[0]] = best[1]
        # Lanes of one priority go by due time; priorities among themselves by their leaders' ages.
        return sorted(
            heads, key=lambda lane: (-self._score(*self._led(heads[lane], leaders), now), heads[lane][1].due)
        )

    @staticmethod
    def _led(
        head: tuple[int, PendingRequest], leaders: dict[int, PendingRequest]
    ) -> tuple[int, PendingRequest]:
        return head[0], leaders[head[0]]

    def _score(self, priority: int, head: PendingRequest, now: float) -> float:
        return priority + (now - head.arrived) / self._age_s

    def _best(self, lane: Lane, now: float) -> tuple[int, PendingRequest] | None:
        """Priority and request that the lane should run next."""
        best: tuple[int, PendingRequest] | None = None
        score = 0.0
        for priority, level in lane.levels.items():
            head = level.head()
            if head is not None:
                mine = self._score(priority, head, now)
                if best is None or mine > score:
                    best, score = (priority, head), mine
        return best

    def head(self, lane: Lane, now: float) -> PendingRequest:
        """The request that the lane should run next."""
        best = self._best(lane, now)
        assert best is not None
        return best[1]

    def take(self, lane: Lane, room: int, largest: int, now: float) -> list[Part]:
        """Takes requests in order until `room` rows are full or the next request does not fit.

        A request of more than `largest` rows gives as many as there is room for and keeps its place;
        others are taken whole, the first one even when it has more than `room` rows. Of a group that does not fit
        as many requests are taken as do.
        """
        parts: list[Part] = []
        if len(lane.levels) == 1 and not lane.alone:
            room -= self._take_line(lane, room, parts)
        places = requests = rows = 0
        priority: int | None = None
        while room > 0:
            best = self._best(lane, now)
            if best is None:
                break
            if best[0] != priority:
                if requests or rows:
                    assert priority is not None
                    self._left(lane, priority, places, requests, rows)
                    places = requests = rows = 0
                priority = best[0]
            request = best[1]
            start = request.taken
            left = request.rows - start
            if left > room and isinstance(request, RequestGroup):
                fit = request.fitting(room) or (0 if parts else 1)
                if fit < request.count:
                    if fit:
                        front = _front(request, fit)
                        parts.append(front)
                        requests += fit
                        rows += front[2]
                    break
            if left > room and (request.rows > largest or not parts):
                left = min(left, room if request.rows > largest else left)
            elif left > room:
                break
            parts.append((request, start, left, request.attempt))
            request.taken = start + left
            rows += left
            room -= left
            if request.taken == request.rows:
                request.state = RUNNING
                request.level = None
                places += 1
                requests += request.count
            if lane.alone:
                break
        if rows:
            assert priority is not None
            self._left(lane, priority, places, requests, rows)
        return parts

    def _take_line(self, lane: Lane, room: int, parts: list[Part]) -> int:
        """The quick way where one line holds all: whole requests from its front. Returns their rows."""
        ((priority, level),) = lane.levels.items()
        line = level.only_line()
        if line is None:
            return 0
        entered = len(line)
        places = requests = rows = 0
        while line:
            request = line[0]
            if request.level is level:
                start = request.taken
                more = request.rows - start
                if rows + more > room:
                    if isinstance(request, RequestGroup) and (fit := request.fitting(room - rows)):
                        front = _front(request, fit)
                        parts.append(front)
                        requests += fit
                        rows += front[2]
                    break
                places += 1
                requests += request.count
                rows += more
                request.taken = request.rows
                request.state = RUNNING
                request.level = None
                parts.append((request, start, more, request.attempt))
            line.popleft()
        level.entered -= entered - len(line)
        if parts:
            self._left(lane, priority, places, requests, rows)
        return rows

    def overdue(self, now: float) -> list[PendingRequest]:
        """Every waiting request whose deadline has come."""
        found: list[PendingRequest] = []
        for lane in self.lanes.values():
            for level in lane.levels.values():
                found += level.overdue(now)
        return found

    def next_deadline(self) -> float | None:
        """When `overdue` may find something; None while no waiting request has a deadline."""
        times = [level.next_deadline() for lane in self.lanes.values() for level in lane.levels.values()]
        return min((t for t in times if t is not None), default=None)

    def __iter__(self) -> Iterator[PendingRequest]:
        for lane in list(self.lanes.values()):
            for level in list(lane.levels.values()):
                yield from level


def _front(group: RequestGroup, count: int) -> Part:
    """So many requests of a group, to run now."""
    front = group.cut_off(count)
    front.taken = front.rows
    front.state = RUNNING
    front.level = None
    return front, 0, front.rows, front.attempt
