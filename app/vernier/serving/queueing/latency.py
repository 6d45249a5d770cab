"""What an execution will take, how fast work arrives, how wrong that is: the estimates that the policy stands on.

All are learned from what happens, on any clock; nothing here reads one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import exp

#: Weight of one more measurement once a bucket has had several; of one above the estimate, where the
#: undisturbed time is wanted.
_GAIN, _DISTURBED_GAIN = 0.15, 0.01
#: One measurement counts as at most this factor: a stall says nothing of the next batch …
_LARGEST_STEP = 2.0
#: … but this many in a row on the same side say that the whole curve is wrong.
_CONVINCING = 3
#: A bucket that did not run for this number of executions of others is not believed to take longer than they would for
#: the same rows: or one that was disturbed when it was measured would be avoided, and so never measured again.
_STALE = 64
#: One answer in this number may come too late: so the 99th percentile stays on the safe side.
_ONE_IN = 200
#: A step of `Margin`, as a part of the time allowed: a hundred late answers in a row are a fifth of it.
_MARGIN_STEP = 1e-5


class LatencyCurve:
    """Seconds that a slot is taken by one execution, by rows.

    Args:
        buckets: ascending sizes; the last is the largest batch.
        exact: any size up to the largest can run as it is, so that buckets are only points of the curve;
            else a batch is padded to the next bucket.
        seconds: bucket → seconds, as measured before; any part of the buckets, or none.
        undisturbed: predict what an execution takes when nothing else gets in its way, instead of what
            it takes on average.
    """

    __slots__ = (
        "_counts", "_executions", "_far_off", "_ran", "_seconds", "_spread",
        "buckets", "exact", "largest", "undisturbed",
    )  # fmt: skip

    def __init__(
        self,
        buckets: Sequence[int],
        exact: bool,
        seconds: Mapping[int, float] | None = None,
        undisturbed: bool = False,
    ) -> None:
        self.undisturbed = undisturbed
        self.buckets = list(buckets)
        self.exact = exact
        self.largest = self.buckets[-1]
        self._seconds = [0.0] * len(self.buckets)
        self._counts = [0] * len(self.buckets)
        self._executions = 0
        self._ran = [0] * len(self.buckets)  # which execution was the last of each
        self._spread = 0.0  # mean absolute deviation, as a share of the prediction
        self._far_off = 0  # measurements in a row beyond the largest step: above (> 0) or below (< 0)
        for bucket, value in (seconds or {}).items():
            if bucket in self.buckets and value > 0:
                self._set(self.buckets.index(bucket), value)
        self._fill()

    def copy(self, factor: float = 1.0, undisturbed: bool = False) -> LatencyCurve:
        """The same estimates times `factor`, as a start for similar work."""
        made = LatencyCurve(self.buckets, self.exact, undisturbed=undisturbed)
        made._seconds = [value * factor for value in self._seconds]
        return made

    @property
    def known(self) -> bool:
        return self._seconds[-1] > 0.0

    def bucket(self, rows: int) -> int:
        """The rows that are computed when `rows` are wanted."""
        return rows if self.exact else self.buckets[bisect_left(self.buckets, rows)]

    def bucket_below(self, rows: int) -> int:
        """The most rows up to `rows` that run without padding; `rows` itself when there are none."""
        if self.exact:
            return rows
        at = bisect_left(self.buckets, rows + 1)
        return self.buckets[at - 1] if at else rows

    def seconds(self, rows: int) -> float:
        """Predicted seconds for a batch of `rows`; 0 while nothing is known."""
        buckets, values = self.buckets, self._seconds
        at = bisect_left(buckets, rows)
        if at >= len(buckets):
            return values[-1] * rows / self.largest
        high = buckets[at]
        if not self.exact or high == rows or at == 0:
            return values[at]
        low = buckets[at - 1]
        return values[at - 1] + (values[at] - values[at - 1]) * (rows - low) / (high - low)

    @property
    def worst_s(self) -> float:
        """Seconds that few executions of the largest batch pass."""
        return self._seconds[-1] * (1.0 + 2.0 * self._spread)

    def pessimistic(self, rows: int) -> float:
        """Seconds that few executions of `rows` pass."""
        return self.seconds(rows) * (1.0 + 2.0 * self._spread)

    def rows_within(self, seconds: float) -> int:
        """The largest batch predicted to take at most `seconds`; 0 when even the smallest takes longer."""
        buckets, values = self.buckets, self._seconds
        if values[0] > seconds:
            return 0
        at = len(buckets) - 1
        while values[at] > seconds:
            at -= 1
        rows = buckets[at]
        if self.exact and at + 1 < len(buckets):
            rise = values[at + 1] - values[at]
            rows += int((buckets[at + 1] - rows) * (seconds - values[at]) / rise)
        return rows

    def observe(self, rows: int, seconds: float) -> None:
        """Learns from one execution."""
        if seconds <= 0.0:
            return
        buckets = self.buckets
        at = min(bisect_left(buckets, rows), len(buckets) - 1)
        if not self.known:
            self._set(at, seconds)
            self._fill()
            return
        self._executions += 1
        self._ran[at] = self._executions
        predicted = self.seconds(rows)
        ratio = seconds / predicted
        if 1 / _LARGEST_STEP <= ratio <= _LARGEST_STEP:
            self._far_off = 0
            self._spread += 0.05 * (abs(ratio - 1.0) - self._spread)
        else:
            self._far_off = max(self._far_off, 0) + 1 if ratio > 1.0 else min(self._far_off, 0) - 1
            if abs(self._far_off) >= _CONVINCING and not self.undisturbed:
                self._far_off = 0
                self._seconds = [value * ratio for value in self._seconds]
                return
            ratio = _LARGEST_STEP if ratio > 1.0 else 1 / _LARGEST_STEP
        self._correct(at, ratio)
        if self.exact and at > 0 and rows < buckets[at]:
            self._correct(at - 1, ratio)
            self._keep_rising(at - 1)
        self._keep_rising(at)
        self._doubt(at)

    def _correct(self, at: int, ratio: float) -> None:
        self._counts[at] += 1
        gain = max(_GAIN, 1.0 / (1 + self._counts[at]))
        if ratio > 1.0 and self.undisturbed:
            gain = _DISTURBED_GAIN
        self._seconds[at] *= 1.0 + gain * (ratio - 1.0)

    def _doubt(self, at: int) -> None:
        """Larger batches that did not run for long take no longer than several of this one."""
        buckets, values = self.buckets, self._seconds
        for i in range(at + 1, len(buckets)):
            if self._executions - self._ran[i] > _STALE:
                values[i] = max(values[i - 1], min(values[i], values[at] * -(-buckets[i] // buckets[at])))

    def _set(self, at: int, seconds: float) -> None:
        self._seconds[at] = seconds
        self._counts[at] += 1

    def _fill(self) -> None:
        """Guesses the unmeasured buckets: on the line between measured ones, beyond the last in proportion."""
        values, buckets = self._seconds, self.buckets
        measured = [at for at, count in enumerate(self._counts) if count]
        for at in range(len(buckets) if measured else 0):
            below = [m for m in measured if m <= at]
            above = [m for m in measured if m > at]
            if below and above:
                low, high = below[-1], above[0]
                share = (buckets[at] - buckets[low]) / (buckets[high] - buckets[low])
                values[at] = values[low] + share * (values[high] - values[low])
            elif below:
                values[at] = values[below[-1]] * buckets[at] / buckets[below[-1]]
            else:
                values[at] = values[above[0]]
        for at in range(1, len(buckets)):
            values[at] = max(values[at], values[at - 1])

    def _keep_rising(self, at: int) -> None:
        """More rows never take less time; the point just corrected is believed, its neighbours give way."""
        values = self._seconds
        i = at + 1
        while i < len(values) and values[i] < values[i - 1]:
            values[i] = values[i - 1]
            i += 1
        i = at - 1
        while i >= 0 and values[i] > values[i + 1]:
            values[i] = values[i + 1]
            i -= 1


class Margin:
    """How much earlier than it must an answer has to be predicted, so that one in two hundred comes too late.

    The stochastic approximation of Robbins and Monro (1951): an answer that came too late moves it up by 199 steps,
    any other one down by a step. So whatever the predictions leave out is learned from what became of them, and
    while every answer is in time it costs nothing: below capacity no request is refused for a stall that all can bear.

    Attributes:
        seconds: from 0 to half of what was allowed.
    """

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0

    def observe(self, too_late: bool, allowed_s: float, count: int = 1) -> None:
        """`count` answers one after the other, when each was allowed to take `allowed_s` in all."""
        step = _MARGIN_STEP * allowed_s * count
        if too_late:
            self.seconds = min(self.seconds + (_ONE_IN - 1) * step, allowed_s / 2)
        else:
            self.seconds = max(0.0, self.seconds - step)


class ArrivalRate:
    """Rows per second, forgetting what is older than about `memory_s`."""

    __slots__ = ("_began", "_memory_s", "_rate", "_rows", "_seen", "_window_s")

    def __init__(self, memory_s: float = 0.05, window_s: float = 0.002) -> None:
        self._memory_s = memory_s
        self._window_s = window_s
        self._rate = 0.0
        self._seen = 0.0  # weight of all measurements so far; 1 once the memory is full
        self._rows = 0
        self._began: float | None = None

    def add(self, rows: int) -> None:
        self._rows += rows

    def per_second(self, now: float) -> float:
        if self._began is None:
            self._began = now
        elapsed = now - self._began
        if elapsed >= self._window_s:
            weight = 1.0 - exp(-elapsed / self._memory_s)
            self._seen += weight * (1.0 - self._seen)
            self._rate += weight / self._seen * (self._rows / elapsed - self._rate)
            self._rows = 0
            self._began = now
        return self._rate
