"""The waiting requests, in the order in which they should run. No clock, no thread, no loop.

Requests that can share an execution (one variant, one shape) wait in one batch queue, as spans of their batches. Inside
a priority the earliest due time goes first: the deadline, or for a request without one its arrival plus a patience, so
that it cannot be overtaken for ever. Between priorities a step is worth `age_s` of waiting: a request that
has waited that much longer than the head of the next higher priority goes before it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import count, takewhile

from vernier.serving.queueing.span import BatchKey, ExecutionPart, Span

_Entry = tuple[float, int, Span]


class PriorityLevel:
    """The spans of one priority in one batch queue, by due time; there is at least one, or the level is gone.

    Attributes:
        dated, undated: the spans with deadlines, and those without, whose order is that of their arrival; each with its
            due time and a ticket, which keeps those of one due time in the order in which they came.
    """

    __slots__ = ("_ticket", "dated", "undated")

    def __init__(self) -> None:
        self._ticket = count()
        self.dated: list[_Entry] = []
        self.undated: list[_Entry] = []

    def __iter__(self) -> Iterator[Span]:
        return (span for _, _, span in (*self.undated, *self.dated))

    def _line(self, span: Span) -> list[_Entry]:
        return self.undated if span.deadline is None else self.dated

    def push(self, span: Span) -> None:
        insort(self._line(span), (span.due, next(self._ticket), span))

    def remove(self, span: Span) -> bool:
        """Takes a span out; True when it was the last one."""
        line = self._line(span)
        at = bisect_left(line, (span.due, -1, span))
        while line[at][2] is not span:
            at += 1
        del line[at]
        return not self.undated and not self.dated

    def head(self) -> Span:
        """The span that is due first."""
        dated, undated = self.dated, self.undated
        return (dated if not undated or (dated and dated[0][0] < undated[0][0]) else undated)[0][2]

    def overdue(self, now: float) -> Iterator[Span]:
        """The spans with deadlines that were due."""
        return (span for _, _, span in takewhile(lambda entry: entry[0] <= now, self.dated))

    def oldest(self) -> float:
        """Arrival of the span that has waited longest."""
        return min([span.arrived for _, _, span in (*self.undated[:1], *self.dated)])


class BatchQueue:
    """Spans whose requests can share an execution.

    Attributes:
        levels: by priority.
        requests, rows: how many wait.
    """

    __slots__ = ("alone", "key", "levels", "precision", "requests", "rows", "shape")

    def __init__(self, key: BatchKey) -> None:
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
        batch_queues: those in which something waits.
        requests, rows: how many wait.
    """

    def __init__(self, age_s: float, largest: int) -> None:
        self._age_s = age_s
        self._largest = largest
        self._rows_of: dict[int, int] = {}  # by priority
        self.batch_queues: dict[BatchKey, BatchQueue] = {}
        self.requests = 0
        self.rows = 0

    # --- in ---------------------------------------------------------------------------------------
    def push(self, span: Span, key: BatchKey) -> None:
        """Has a span wait that was in no queue before."""
        batch_queue = self.batch_queues.get(key)
        if batch_queue is None:
            batch_queue = self.batch_queues[key] = BatchQueue(key)
        priority = span.priority
        level = batch_queue.levels.get(priority)
        if level is None:
            level = batch_queue.levels[priority] = PriorityLevel()
        span.key = key
        span.batch.state.waiting.append(span)
        level.push(span)
        self._count(batch_queue, priority, len(span), span.rows)

    # --- out, early -------------------------------------------------------------------------------
    def remove(self, span: Span) -> None:
        """Takes a waiting span out."""
        batch_queue = self._queue_of(span)
        self._take_off(batch_queue, span)
        self._count(batch_queue, span.priority, -len(span), span.taken - span.rows)

    def withdraw(self, span: Span, request: int) -> None:
        """Takes one request out of a waiting span; the others keep their place, or stand where it was."""
        start, stop, rows = span.start, span.stop, span.rows
        if stop - start == 1:
            self.remove(span)
            return
        batch_queue = self._queue_of(span)
        rest = None
        if request == start:
            span.narrow(start + 1, stop)
        else:
            if request + 1 < stop:
                rest = span.part(request + 1, stop, self._largest)
            span.narrow(start, request)
        self._count(batch_queue, span.priority, len(span) - (stop - start), span.rows - rows)
        if rest is not None:
            self.push(rest, batch_queue.key)

    def _queue_of(self, span: Span) -> BatchQueue:
        assert span.key is not None
        return self.batch_queues[span.key]

    def _take_off(self, batch_queue: BatchQueue, span: Span) -> None:
        """The span waits no longer; its requests are counted still."""
        if batch_queue.levels[span.priority].remove(span):
            del batch_queue.levels[span.priority]
        span.key = None
        span.batch.state.waiting.remove(span)

    def _count(self, batch_queue: BatchQueue, priority: int, requests: int, rows: int) -> None:
        """So many more wait, or fewer."""
        batch_queue.requests += requests
        batch_queue.rows += rows
        if not batch_queue.requests:
            del self.batch_queues[batch_queue.key]
        self.requests += requests
        self.rows += rows
        self._rows_of[priority] = self._rows_of.get(priority, 0) + rows
        if not self._rows_of[priority]:
            del self._rows_of[priority]

    # --- the order --------------------------------------------------------------------------------
    def rows_ahead(self, priority: int) -> int:
        """Rows that go before a new request of this priority, ageing aside."""
        return sum([rows for other, rows in self._rows_of.items() if other >= priority])

    def by_urgency(self, now: float) -> list[BatchQueue]:
        """The batch queues, the one whose head should run first in front."""
        if len(self.batch_queues) <= 1:
            return list(self.batch_queues.values())
        heads = {batch_queue: self.head(batch_queue, now) for batch_queue in self.batch_queues.values()}
        leaders: dict[int, Span] = {}
        for head in heads.values():
            leader = leaders.get(head.priority)
            if leader is None or head.due < leader.due:
                leaders[head.priority] = head

        def urgency(batch_queue: BatchQueue) -> tuple[float, float]:
            head = heads[batch_queue]
            return -self._score(leaders[head.priority], now), head.due

        # Batch queues of one priority go by due time; priorities among themselves by their leaders' ages.
        return sorted(heads, key=urgency)

    def _score(self, head: Span, now: float) -> float:
        return head.priority + (now - head.arrived) / self._age_s

    def head(self, batch_queue: BatchQueue, now: float) -> Span:
        """The span that the batch queue should run next."""
        heads = [level.head() for level in batch_queue.levels.values()]
        return heads[0] if len(heads) == 1 else max(heads, key=lambda head: self._score(head, now))

    def overdue(self, now: float) -> list[Span]:
        """Every waiting span with deadlines that was due."""
        return [span for level in self._levels() for span in level.overdue(now)]

    def next_due(self) -> float | None:
        """When `overdue` may find something; None while no waiting request has a deadline."""
        return min([level.dated[0][0] for level in self._levels() if level.dated], default=None)

    def _levels(self) -> list[PriorityLevel]:
        return [level for batch_queue in self.batch_queues.values() for level in batch_queue.levels.values()]

    def __iter__(self) -> Iterator[Span]:
        for level in self._levels():
            yield from level

    # --- out, to run ------------------------------------------------------------------------------
    def take(self, batch_queue: BatchQueue, room: int, now: float) -> list[ExecutionPart]:
        """Takes requests in order until `room` rows are full or the next request does not fit.

        A request of more rows than the largest execution gives as many as there is room for and keeps its place;
        others are taken whole, the first one even when it has more than `room` rows.
        """
        parts: list[ExecutionPart] = []
        while room > 0 and batch_queue.levels:
            span = self.head(batch_queue, now)
            left = span.rows - span.taken
            if span.gather is not None:
                part = self._take_rows(batch_queue, span, min(left, room))
            elif left <= room:
                part = self._take_whole(batch_queue, span)
            else:
                fit = span.fitting(room) or (0 if parts else 1)
                if not fit:
                    break
                part = self._take_front(batch_queue, span, fit)
                room = 0  # the next request does not fit
            parts.append(part)
            room -= part.rows
            if batch_queue.alone:
                break
        return parts

    def _take_rows(self, batch_queue: BatchQueue, span: Span, rows: int) -> ExecutionPart:
        part = ExecutionPart(span.batch, span, span.first + span.taken, rows)
        span.taken += rows
        over = span.taken == span.rows
        if over:
            self._take_off(batch_queue, span)
        self._count(batch_queue, span.priority, -int(over), -rows)
        return part

    def _take_whole(self, batch_queue: BatchQueue, span: Span) -> ExecutionPart:
        self._take_off(batch_queue, span)
        self._count(batch_queue, span.priority, -len(span), -span.rows)
        return ExecutionPart(span.batch, span, span.first, span.rows)

    def _take_front(self, batch_queue: BatchQueue, span: Span, count: int) -> ExecutionPart:
        """The first `count` requests of a span; the others keep its place."""
        if count == len(span):
            return self._take_whole(batch_queue, span)
        front = span.part(span.start, span.start + count, self._largest)
        front.due = span.due
        span.narrow(front.stop, span.stop)
        self._count(batch_queue, span.priority, -count, -front.rows)
        return ExecutionPart(front.batch, front, front.first, front.rows)
