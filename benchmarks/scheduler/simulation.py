"""The batching policy in virtual time: whole loads in a fraction of a second, exactly repeatable.

The queue, the estimates, the policy and the books are those of the service; only slots and clients are simulated.
Useful to compare policies, to size a deployment from a latency curve, and to test what would take hours.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

import numpy as np

from vernier.border.batch import Answer, RequestBatch
from vernier.errors import DeadlineExceeded, QueueFull, VernierError
from vernier.metrics import ModelMetrics
from vernier.serving.queueing.batcher import Batcher, Numbers
from vernier.serving.queueing.batching import DELAY, FULL, Decision, Dispatch, Limits, Slots, Wait, Waiting
from vernier.serving.queueing.latency import LatencyCurve
from vernier.serving.queueing.span import BatchState
from vernier.serving.scheduling.execution import Execution
from vernier.serving.scheduling.request_tracker import RequestTracker
from vernier.serving.scheduling.results import Results
from vernier.tensors import Arrays

#: The only runtime there is.
_RUNTIME = "simulated"


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


class SimulatedRequest:
    """Remembers what happened to it.

    Attributes:
        number: in order of arrival.
        batch, index: where it came.
        outcome: `answered`, `failed`, `expired`, `cancelled`, `refused`, or None while it is under way.
        ended_at: when.
        retry_after_s: of a refused one.
    """

    __slots__ = ("arrival", "batch", "ended_at", "index", "number", "outcome", "retry_after_s")

    def __init__(self, arrival: Arrival, number: int) -> None:
        self.arrival = arrival
        self.number = number
        self.batch: RequestBatch | None = None
        self.index = 0
        self.outcome: str | None = None
        self.ended_at = 0.0
        self.retry_after_s = 0.0

    def end(self, outcome: str, now: float) -> None:
        """Raises AssertionError when it has ended before."""
        assert self.outcome is None, f"a request was {self.outcome}, and then {outcome}"
        self.outcome, self.ended_at = outcome, now

    @property
    def latency_s(self) -> float:
        return self.ended_at - self.arrival.at


@dataclass
class Trace:
    """Everything that happened, in order."""

    requests: list[SimulatedRequest] = field(default_factory=list)
    batches: list[RequestBatch] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)

    def of(self, outcome: str) -> list[SimulatedRequest]:
        return [request for request in self.requests if request.outcome == outcome]

    def latencies(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Seconds of every answered request, ascending."""
        return np.sort(np.array([request.latency_s for request in self.of("answered")]))


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


def _nothing(execution: Execution) -> None:
    """Computes no outputs: times do not need them."""
    execution.outputs = [{}] * len(execution.parts)


class Simulation:
    """One run. It is the target of its batches.

    Args:
        slots: how many.
        service: rows of an execution after padding → seconds that a slot is taken.
        input_name: of the single input; its arrays are [rows] or, with lengths, [rows, length].
        joined: requests that come at one moment and are alike come as one batch.
        make_inputs: of requests of a batch, in order; zeros when it is not given.
        compute: at the end of an execution, computes its outputs or sets its error.
        watch: called after every step with (now, self): for assertions in between.
        on_dispatch, on_answer, on_release: called when it happens, for assertions.
    """

    def __init__(
        self,
        batcher: Batcher,
        slots: int,
        service: Callable[[int], float],
        *,
        input_name: str = "x",
        joined: bool = False,
        make_inputs: Callable[[Sequence[Arrival]], Arrays] | None = None,
        compute: Callable[[Execution], None] = _nothing,
        watch: Callable[[float, Simulation], None] | None = None,
        on_dispatch: Callable[[float, Simulation, Execution], None] | None = None,
        on_answer: Callable[[RequestBatch, range, Answer], None] | None = None,
        on_release: Callable[[RequestBatch], None] | None = None,
    ) -> None:
        self.batcher = batcher
        self.idle = slots
        self.now = 0.0
        self.running: list[Execution] = []
        self.trace = Trace()
        self.metrics = ModelMetrics("simulated", "1")
        self.tracker = RequestTracker(self.metrics, _raise)
        runtimes = dict.fromkeys(batcher.precisions, _RUNTIME)
        self.results = Results("simulated", batcher, self.tracker, self.metrics, runtimes)
        self._slots = slots
        self._service = service
        self._input = input_name
        self._joined = joined
        self._make_inputs = make_inputs or self._zeros
        self._compute = compute
        self._watch = watch
        self._on_dispatch = on_dispatch
        self._on_answer = on_answer
        self._on_release = on_release
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ticket = count()
        self._wakes: set[float] = set()
        self._arrays: dict[tuple[int, ...], Arrays] = {}

    def run(self, arrivals: Iterable[Arrival]) -> Trace:
        """Plays the arrivals, in ascending order of time, until nothing is left to do."""
        coming = iter(arrivals)
        upcoming = next(coming, None)
        while upcoming is not None or self._events:
            if upcoming is not None and (not self._events or upcoming.at <= self._events[0][0]):
                self.now = upcoming.at
                together = [upcoming]
                upcoming = next(coming, None)
                while upcoming is not None and self._joins(together[0], upcoming):
                    together.append(upcoming)
                    upcoming = next(coming, None)
                self._arrive(together)
            else:
                self.now, _, call = heapq.heappop(self._events)
                call()
            self.tracker.deliver()
            next_at = upcoming.at if upcoming is not None else None
            if (self._events and self._events[0][0] == self.now) or next_at == self.now:
                continue  # what happens at one moment is decided on together
            self._pump()
            if self._watch is not None:
                self._watch(self.now, self)
        return self.trace

    def _at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._ticket), call))

    # --- clients ----------------------------------------------------------------------------------
    def _joins(self, first: Arrival, other: Arrival) -> bool:
        return (
            self._joined
            and all(
                getattr(first, name) == getattr(other, name)
                for name in ("at", "priority", "length", "precision")
            )
            and (first.timeout_s is None) == (other.timeout_s is None)
        )

    def _arrive(self, together: Sequence[Arrival]) -> None:
        now, first = self.now, together[0]
        requests = [SimulatedRequest(a, len(self.trace.requests) + at) for at, a in enumerate(together)]
        deadlines = [now + arrival.timeout_s for arrival in together if arrival.timeout_s is not None]
        batch = RequestBatch(
            self._make_inputs(together),
            [arrival.rows for arrival in together],
            self.batcher.layout.outputs,
            first.precision,
            first.priority,
            [now] * len(together),
            deadlines or None,
            self,
            requests,
        )
        self.trace.requests += requests
        self.trace.batches.append(batch)
        for index, request in enumerate(requests):
            request.batch, request.index = batch, index
        batch.state = BatchState(batch.rows, now)
        refused = self.batcher.admit(batch, 0, len(requests), now, self._free_at)
        for numbers, error in refused:
            self.tracker.refused(batch, numbers, error)
        self.tracker.admitted(len(requests) - sum(len(numbers) for numbers, _ in refused))
        for request in requests:
            if request.arrival.cancel_after_s is not None:
                self._at(now + request.arrival.cancel_after_s, self._canceller(request))
        for deadline in set(deadlines):
            self._at(deadline, _wake)  # as the scheduler's timer does

    def _zeros(self, arrivals: Sequence[Arrival]) -> Arrays:
        rows = sum(arrival.rows for arrival in arrivals)
        shape = (rows, arrivals[0].length) if self.batcher.layout.dims else (rows,)
        inputs = self._arrays.get(shape)
        if inputs is None:
            inputs = self._arrays[shape] = {self._input: np.zeros(shape, np.float32)}
        return inputs

    def _canceller(self, request: SimulatedRequest) -> Callable[[], None]:
        def cancel() -> None:
            batch, index = request.batch, request.index
            assert batch is not None
            if not batch.state.ended[index]:
                request.end("cancelled", self.now)
                self.batcher.withdraw(batch, index)
                self.tracker.cancelled(batch, index)

        return cancel

    # --- the target -------------------------------------------------------------------------------
    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        for index in requests:
            batch.tokens[index].end("answered", self.now)
        if self._on_answer is not None:
            self._on_answer(batch, requests, answer)

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        for index in requests:
            request: SimulatedRequest = batch.tokens[index]
            if isinstance(error, QueueFull):
                request.end("refused", self.now)
                request.retry_after_s = error.retry_after_s
            else:
                request.end("expired" if isinstance(error, DeadlineExceeded) else "failed", self.now)

    def released(self, batch: RequestBatch) -> None:
        if self._on_release is not None:
            self._on_release(batch)

    # --- slots ------------------------------------------------------------------------------------
    def _free_at(self) -> tuple[float, ...]:
        return (*([0.0] * self.idle), *[execution.ends for execution in self.running])

    def _state(self) -> Slots:
        return Slots(self.idle, self._slots)

    def _pump(self) -> None:
        now, batcher = self.now, self.batcher
        for batch, requests in batcher.overdue(now):
            self.tracker.expired(batch, requests)
        for execution in self.running:
            if execution.deadline is not None and execution.deadline <= now:
                self.results.overdue(execution, now)
        late: list[Numbers] = []
        while True:
            choice, wake = batcher.choose(now, self._state, late)
            if choice is None:
                break
            execution = batcher.take(choice, now)
            self.idle -= 1
            self.running.append(execution)
            self.trace.executions.append(execution)
            if self._on_dispatch is not None:
                self._on_dispatch(now, self, execution)
            self._at(now + self._service(execution.bucket), self._finisher(execution))
        for batch, requests in late:
            self.tracker.expired(batch, requests)
        if wake is not None and wake not in self._wakes:
            self._wakes.add(wake)
            self._at(max(wake, now), lambda: self._wakes.discard(wake))
        self.tracker.deliver()

    def _finisher(self, execution: Execution) -> Callable[[], None]:
        def finish() -> None:
            now = self.now
            self._compute(execution)
            self.idle += 1
            self.running.remove(execution)
            self.batcher.ran(execution, now - execution.dispatched)
            self.results.settle(execution, now)
            self.batcher.learn(self.results.take_promised(), now)

        return finish


def _wake() -> None:
    """The pump follows."""


def _raise(context: dict[str, Any]) -> None:
    raise context["exception"]


def percentile(
    latencies: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]], share: float
) -> float:
    """The latency that `share` of the requests stay under; infinity when none was answered."""
    values = np.asarray(latencies)
    return float(np.quantile(values, share)) if values.size else float("inf")
