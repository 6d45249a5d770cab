"""The batcher in virtual time: what a policy would do with a load, in milliseconds of real time.

Drives the very Batcher that the scheduler drives, so that tests of it are tests of production's decisions.
Used by the property tests, and to compare policies (`fixed_delay` is the usual one) on equal load.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random

import numpy as np

from vernier.errors import VernierError
from vernier.serving.batcher import Batcher
from vernier.serving.batching import DELAY, FULL, Decision, Dispatch, Limits, Slots, Wait, Waiting
from vernier.serving.execution import Batch
from vernier.serving.latency import LatencyCurve
from vernier.serving.request import ENDED, Answer, PendingRequest, RequestGroup
from vernier.tensors import Arrays


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come. Times in seconds; `length` is the size of the sequence dimension, if there is one."""

    at: float
    rows: int = 1
    priority: int = 0
    timeout_s: float | None = None
    cancel_after_s: float | None = None
    length: int = 1
    precision: str | None = None


class SimulatedRequest(PendingRequest):
    """Remembers what happened to it.

    Attributes:
        outcome: `answered`, `expired`, `cancelled`, `refused`, or None while it is under way.
        ended_at: when.
        retry_after_s: of a refused one.
    """

    __slots__ = ("arrival", "ended_at", "outcome", "retry_after_s")

    def __init__(self, arrival: Arrival, inputs: Arrays) -> None:
        deadline = None if arrival.timeout_s is None else arrival.at + arrival.timeout_s
        super().__init__(inputs, arrival.rows, None, arrival.precision, arrival.priority, deadline)
        self.arrival = arrival
        self.outcome: str | None = None
        self.ended_at = 0.0
        self.retry_after_s = 0.0

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        """Nobody waits for an answer in virtual time."""

    @property
    def latency_s(self) -> float:
        return self.ended_at - self.arrival.at


@dataclass
class Trace:
    """Everything that happened, in order."""

    requests: list[SimulatedRequest] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    def of(self, outcome: str) -> list[SimulatedRequest]:
        return [request for request in self.requests if request.outcome == outcome]

    def latencies(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Seconds of every answered request, ascending."""
        return np.sort(np.array([request.latency_s for request in self.of("answered")]))


def group_of(requests: Sequence[PendingRequest]) -> RequestGroup:
    """Requests that are alike but for their numbers and rows, as a group."""
    first = requests[0]
    inputs = {name: np.concatenate([r.inputs[name] for r in requests]) for name in first.inputs}
    deadlines = [r.deadline for r in requests if r.deadline is not None] or None
    return RequestGroup(
        requests,
        inputs,
        [request.rows for request in requests],
        first.outputs,
        first.precision,
        first.priority,
        deadlines,
    )


def fixed_delay(delay_s: float) -> Callable[..., Decision]:
    """The usual policy: full batches at once, others when the oldest request has waited `delay_s`."""

    def decide(
        waiting: Waiting, now: float, slots: Slots, curve: LatencyCurve, rate: float, limits: Limits
    ) -> Decision:
        if waiting.rows >= limits.max_rows:
            return Dispatch(limits.max_rows, FULL)
        if now >= waiting.oldest + delay_s:
            return Dispatch(waiting.rows, DELAY)
        return Wait(waiting.oldest + delay_s)

    return decide


def poisson(rate: float, seconds: float, seed: int, **fields: float | int | None) -> Iterator[Arrival]:
    """Arrivals at `rate` a second."""
    random = Random(seed)
    at = 0.0
    while True:
        at += random.expovariate(rate)
        if at > seconds:
            return
        yield Arrival(at, **fields)  # type: ignore[arg-type]


class Simulation:
    """One run.

    Args:
        slots: how many.
        service: rows of a batch after padding → seconds that a slot is taken.
        input_name: of the single input; its arrays are [rows] or, with lengths, [rows, length].
        grouped: requests that come at one moment and differ in nothing but when they are cancelled come as a group.
        watch: called after every step with (now, self): for assertions in between.
    """

    def __init__(
        self,
        batcher: Batcher,
        slots: int,
        service: Callable[[int], float],
        *,
        input_name: str = "x",
        grouped: bool = False,
        watch: Callable[[float, Simulation], None] | None = None,
        on_dispatch: Callable[[float, Simulation, Batch], None] | None = None,
    ) -> None:
        self.batcher = batcher
        self.idle = slots
        self.running: list[Batch] = []
        self.trace = Trace()
        self._slots = slots
        self._service = service
        self._input = input_name
        self._grouped = grouped
        self._watch = watch
        self._on_dispatch = on_dispatch
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._ticket = count()
        self._wakes: set[float] = set()
        self._arrays: dict[tuple[int, ...], Arrays] = {}

    def run(self, arrivals: Iterable[Arrival]) -> Trace:
        """Plays the arrivals, in ascending order of time, until nothing is left to do."""
        coming = iter(arrivals)
        upcoming = next(coming, None)
        while upcoming is not None or self._events:
            if upcoming is not None and (not self._events or upcoming.at <= self._events[0][0]):
                now = upcoming.at
                together = [upcoming]
                upcoming = next(coming, None)
                while upcoming is not None and self._joins(together[0], upcoming):
                    together.append(upcoming)
                    upcoming = next(coming, None)
                self._arrive(together, now)
            else:
                now, _, call = heapq.heappop(self._events)
                call(now)
            next_at = upcoming.at if upcoming is not None else None
            if (self._events and self._events[0][0] == now) or next_at == now:
                continue  # what happens at one moment is decided on together
            self._pump(now)
            if self._watch is not None:
                self._watch(now, self)
        return self.trace

    def _at(self, time: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._ticket), call))

    def _joins(self, first: Arrival, other: Arrival) -> bool:
        alike = replace(other, cancel_after_s=first.cancel_after_s, rows=first.rows) == first
        return self._grouped and alike and max(first.rows, other.rows) <= self.batcher.layout.largest

    def _arrive(self, together: Sequence[Arrival], now: float) -> None:
        requests = [SimulatedRequest(arrival, self._inputs_of(arrival)) for arrival in together]
        self.trace.requests.extend(requests)
        first = requests[0]
        asked = group_of(requests) if len(requests) > 1 else first
        refusal = self.batcher.admit(asked, now, self._free_at)
        for request in requests:
            if refusal is not None and (asked is first or request.group is not asked):
                request.outcome, request.ended_at = "refused", now
                request.retry_after_s = refusal.retry_after_s
                continue
            if request.arrival.cancel_after_s is not None:
                self._at(now + request.arrival.cancel_after_s, self._ender(request, "cancelled"))
            if request.deadline is not None:
                # The scheduler's timer gives up what runs, too.
                self._at(request.deadline, self._ender(request, "expired"))

    def _inputs_of(self, arrival: Arrival) -> Arrays:
        shape = (arrival.rows, arrival.length) if self.batcher.layout.dims else (arrival.rows,)
        inputs = self._arrays.get(shape)
        if inputs is None:
            inputs = self._arrays[shape] = {self._input: np.zeros(shape, np.float32)}
        return inputs

    def _ender(self, request: SimulatedRequest, outcome: str) -> Callable[[float], None]:
        return lambda now: self._end(request, outcome, now)

    def _free_at(self) -> tuple[float, ...]:
        return (*([0.0] * self.idle), *[batch.ends for batch in self.running])

    def _state(self) -> Slots:
        return Slots(self.idle, self._slots, min([batch.ends for batch in self.running], default=None))

    def _end(self, request: SimulatedRequest, outcome: str, now: float) -> None:
        if request.outcome is None:
            request.outcome, request.ended_at = outcome, now
            self.batcher.single_out(request)
            self.batcher.discard(request)

    def _pump(self, now: float) -> None:
        batcher = self.batcher
        for request in batcher.overdue(now):
            self._end(request, "expired", now)  # type: ignore[arg-type]
        late: list[PendingRequest] = []
        while True:
            choice, wake = batcher.choose(now, self._state, late)
            if choice is None:
                break
            batch = batcher.take(choice, now)
            self.idle -= 1
            self.running.append(batch)
            self.trace.batches.append(batch)
            if self._on_dispatch is not None:
                self._on_dispatch(now, self, batch)
            self._at(now + self._service(batch.bucket), self._finisher(batch))
        for request in late:
            self._end(request, "expired", now)  # type: ignore[arg-type]
        if wake is not None and wake not in self._wakes:
            self._wakes.add(wake)
            self._at(max(wake, now), lambda t: self._wakes.discard(wake))

    def _finisher(self, batch: Batch) -> Callable[[float], None]:
        def finish(now: float) -> None:
            self.idle += 1
            self.running.remove(batch)
            self.batcher.ran(batch, now - batch.dispatched)
            for request, _, rows, _ in batch.each():
                request.unanswered -= rows
                if not request.unanswered and request.state != ENDED:
                    self.batcher.answered(request, now)
                    self._end(request, "answered", now)  # type: ignore[arg-type]

        return finish


def percentile(
    latencies: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]], share: float
) -> float:
    """The latency that `share` of the requests stay under; infinity when none was answered."""
    values = np.asarray(latencies)
    return float(np.quantile(values, share)) if values.size else float("inf")
