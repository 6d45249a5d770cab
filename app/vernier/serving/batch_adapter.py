"""Until the scheduler takes batches itself."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

from vernier.border.batch import Answer, RequestBatch, cut
from vernier.errors import DeadlineExceeded, VernierError
from vernier.serving.request import NEW, JoinedRequests, PendingRequest, RequestGroup


class Member(PendingRequest):
    __slots__ = ("batch", "index")

    def __init__(self, batch: RequestBatch, index: int) -> None:
        self.batch, self.index = batch, index
        self.group = None
        self.state = NEW

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        target = self.batch.target
        if answer is not None:
            target.answered(self.batch, range(self.index, self.index + 1), answer)
        else:
            assert error is not None
            target.failed(self.batch, (self.index,), error)


class Group(RequestGroup):
    __slots__ = ()

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        members: list[Any] = self.requests
        self.requests = []
        left = [m for m in members if m is not None]
        if not left:
            return
        batch = left[0].batch
        if answer is None:
            assert error is not None
            batch.target.failed(batch, [m.index for m in left], error)
        elif len(left) == len(members) and left[-1].index - left[0].index + 1 == len(left):
            batch.target.answered(batch, range(left[0].index, left[-1].index + 1), answer)
        else:
            for m, outputs in zip(members, cut(answer.outputs, self.each), strict=True):
                if m is not None:
                    own = Answer(
                        outputs, answer.precision, answer.queue_s, answer.compute_s, answer.batch_size
                    )
                    batch.target.answered(batch, range(m.index, m.index + 1), own)


def submit(scheduler: Any, batch: RequestBatch) -> None:
    clock = scheduler._clock
    rows, deadlines = batch.rows, batch.deadlines
    count = len(rows)
    first = min(deadlines) if deadlines else None
    start = 0
    if first is None or (
        first > clock() and scheduler.refusal(batch.precision, batch.priority, first) is None
    ):
        ends = list(accumulate(rows))
        before, stop = 0, count
        while start < count:
            lo, hi = before, ends[stop - 1]
            arrays = (
                {n: a[lo:hi] for n, a in batch.inputs.items()}
                if scheduler._layout.kind != "none"
                else batch.inputs
            )
            joined = JoinedRequests(
                arrays, rows[start:stop], batch.outputs, batch.precision, batch.priority, first
            )
            answer = scheduler.run_joined(joined)
            if answer is not None:
                batch.target.answered(batch, range(start, stop), answer)
                start, before, stop = stop, ends[stop - 1], count
                continue
            fit = bisect_right(ends, before + scheduler.room_for_joined(batch.precision), start, stop)
            if fit in (start, stop):
                break
            stop = fit
    if start == count:
        return
    members: list[Any] = [Member(batch, at) for at in range(count)]
    batch.state = members
    lo = sum(rows[:start])
    inputs = {n: a[lo:] for n, a in batch.inputs.items()} if lo else batch.inputs
    left = members[start:]
    own = rows[start:]
    dl = deadlines[start:] if deadlines else None
    now = clock()
    if (
        len(left) > 1
        and max(own) <= scheduler.largest_grouped
        and (dl is None or (min(dl) > now and max(dl) - min(dl) <= 0.05 * (min(dl) - now)))
    ):
        group = Group(left, inputs, own, batch.outputs, batch.precision, batch.priority, dl)
        refusal = scheduler.admit(group)
        if refusal is not None:
            batch.target.failed(batch, [m.index for m in left if m.group is not group], refusal)
        return
    each = cut(inputs, own) if scheduler._layout.kind != "none" else iter([inputs])
    for member, arrays, n in zip(left, each, own, strict=True):
        deadline = deadlines[member.index] if deadlines else None
        PendingRequest.__init__(member, arrays, n, batch.outputs, batch.precision, batch.priority, deadline)
        if deadline is not None and clock() >= deadline:
            batch.target.failed(
                batch,
                (member.index,),
                DeadlineExceeded(
                    "the deadline had passed before the request could be queued; allow more time"
                ),
            )
            continue
        error = scheduler.admit(member)
        if error is not None:
            batch.target.failed(batch, (member.index,), error)


def cancel(scheduler: Any, batch: RequestBatch, index: int) -> None:
    if batch.state:
        scheduler._cancel(batch.state[index])
