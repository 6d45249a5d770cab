"""Random schedules in virtual time, and what must hold of every one of them.

Requests are computed, at the end of their execution: y = 2 x. Some fail whatever executes them, of some the reduced
variant gives no finite output; and the memory of a batch is written over as soon as it is released.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from benchmarks.scheduler.simulation import Arrival, SimulatedRequest, Simulation, Trace
from vernier.border.batch import Answer, RequestBatch
from vernier.engine.base import Slot, StageTimes, default_buckets
from vernier.errors import EngineError
from vernier.package.manifest import SequenceDim
from vernier.serving.queueing.admission import Policy
from vernier.serving.queueing.batcher import Batcher
from vernier.serving.queueing.batching import Decide, decide
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.scheduling.execution import REFERENCE, Execution
from vernier.tensors import Arrays, TensorSpec

LENGTHS = [4, 16, 64]
PRECISIONS = ("fp32", "int8")
#: The numbers of a request's rows, from its own number on; no request has more rows.
ROWS = 64


@dataclass(frozen=True)
class Schedule:
    """A model, a load and a machine.

    Attributes:
        bad, spoiled: numbers of the requests that fail, and of those whose outputs the reduced variant spoils.
    """

    largest: int
    exact: bool
    sequence: bool
    slots: int
    policy: Policy
    fixed_s: float
    row_s: float
    noise: float
    known_curve: bool
    arrivals: tuple[Arrival, ...]
    seed: int = 0
    joined: bool = False
    bad: frozenset[int] = frozenset()
    spoiled: frozenset[int] = frozenset()
    in_place: bool = False
    fresh: bool = True


def make_batcher(
    largest: int,
    exact: bool = True,
    policy: Policy | None = None,
    curve: dict[int, float] | None = None,
    sequence: bool = False,
    policy_function: Decide = decide,
    buckets: list[int] | None = None,
) -> Batcher:
    """A batcher of a model with one input `x` [batch] or, with a sequence, [batch, frames]."""
    shape = ("batch", "frames") if sequence else ("batch",)
    layout = BatchLayout(
        "dynamic",
        buckets or default_buckets(largest),
        [TensorSpec("x", "float32", shape)],
        [TensorSpec("y", "float32", ("batch",))],
        "batch",
        [SequenceDim(dim="frames", buckets=LENGTHS)] if sequence else [],
        {"frames": 16},
    )
    return Batcher(
        layout,
        dict.fromkeys(PRECISIONS, exact),
        "int8",
        policy or Policy(),
        dict.fromkeys(PRECISIONS, curve) if curve else None,
        policy_function,
    )


def random_schedule(random: Random) -> Schedule:
    """Anything that clients may do to a model, biased to what is close to its capacity."""
    largest = random.choice([1, 2, 3, 8, 16])
    slots = random.choice([1, 1, 2, 4])
    fixed_s, row_s = random.choice([(0.003, 0.0), (0.0, 0.001), (0.002, 0.0005), (0.0001, 0.00001)])
    capacity = slots * largest / (fixed_s + largest * row_s)
    rate = capacity * random.choice([0.1, 0.5, 0.9, 1.5, 5.0]) / 1.5
    sequence = random.random() < 0.25
    at = 0.0
    arrivals: list[Arrival] = []
    joined = random.random() < 0.5
    full_s = fixed_s + largest * row_s
    for _ in range(random.randint(1, 40)):
        at += 0.0 if random.random() < 0.2 else min(random.expovariate(rate), 100 / rate)
        arrival = _random_arrival(random, at, largest, full_s, sequence)
        arrivals.append(arrival)
        for _ in range(random.choice([0, 0, 1, 5, 20]) if joined else 0):
            arrivals.append(_joining(random, arrival, largest, full_s))
    faulty = random.random() < 0.3
    numbers = range(len(arrivals))
    return Schedule(
        largest,
        random.random() < 0.5,
        sequence,
        slots,
        Policy(
            random.choice([0.0, 0.001, 0.01]),
            random.choice([None, None, 0.002, 0.02]),
            random.choice([2, 20, 1000, 1000]),
            random.choice([0.005, 1.0]),
        ),
        fixed_s,
        row_s,
        random.choice([0.0, 0.1, 0.8]),
        random.random() < 0.7,
        tuple(arrivals),
        random.randrange(2**31),
        joined,
        frozenset(n for n in numbers if faulty and random.random() < 0.05),
        frozenset(n for n in numbers if faulty and random.random() < 0.1),
        random.random() < 0.5,
        random.random() < 0.5,
    )


def _random_arrival(random: Random, at: float, largest: int, full_s: float, sequence: bool) -> Arrival:
    return Arrival(
        at,
        random.choice([1, 1, 1, random.randint(1, largest), random.randint(1, 4 * largest)]),
        random.choice([0, 0, 0, 1, -1, 9]),
        random.choice([None, None, full_s, 3 * full_s, random.random() * 10 * full_s]),
        random.choice([None] * 6 + [random.random() * 3 * full_s]),
        random.choice([1, 3, 4, 5, 60, 70]) if sequence else 1,
        random.choice([None, None, None, "fp32"]),
    )


def _joining(random: Random, first: Arrival, largest: int, full_s: float) -> Arrival:
    """A request of the same batch: its rows, the time it leaves and mostly its deadline are its own."""
    timeout_s = first.timeout_s
    if timeout_s is not None:
        timeout_s *= random.choice([1.0, 1.0, 1.02, 0.5 + random.random()])
    return replace(
        first,
        rows=random.choice([first.rows, random.randint(1, largest), random.randint(1, 2 * largest)]),
        timeout_s=timeout_s,
        cancel_after_s=random.choice([None] * 6 + [random.random() * 3 * full_s]),
    )


class DoublingSlot(Slot):
    """y = 2 x of the first of each row's numbers; the rows tell whose they are."""

    def __init__(self, schedule: Schedule, precision: str) -> None:
        self.reads_in_place = schedule.in_place
        self.fresh_outputs = schedule.fresh
        self._bad = schedule.bad
        self._spoiled = schedule.spoiled if precision != REFERENCE else frozenset()
        self._x: np.ndarray = np.zeros(0)
        self._memory = np.zeros(1024, np.float32)

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        self._x = np.full(shapes["x"], -5.0, np.float32)
        return {"x": self._x}

    def read_in_place(self, inputs: Arrays) -> None:
        self._x = inputs["x"]

    def run(self) -> Arrays:
        rows = self._x.reshape(len(self._x), -1)[:, 0]
        assert (rows >= 0).all(), "the memory of a released batch was read"
        whose = {int(number) // ROWS for number in rows}
        if whose & self._bad:
            raise EngineError("bad request")
        y = self._memory[: len(rows)]
        y[:] = 2 * rows
        if whose & self._spoiled:
            y[[int(number) // ROWS in self._spoiled for number in rows]] = np.nan
        return {"y": y.copy() if self.fresh_outputs else y}

    @property
    def last_times(self) -> StageTimes:
        return StageTimes()

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class Observed:
    """What happened in a run, and what must hold whenever it happens.

    Attributes:
        computed: by a request's number: first row and rows of each execution.
        disturbed: numbers of requests that were in an execution that failed, or were spoiled in one.
        released: by a batch's identity, how often.
    """

    schedule: Schedule
    simulation: Simulation | None = None
    computed: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    disturbed: set[int] = field(default_factory=set)
    released: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    made: int = 0

    def make_inputs(self, arrivals: Sequence[Arrival]) -> Arrays:
        numbers = []
        for arrival in arrivals:
            numbers += range(ROWS * self.made, ROWS * self.made + arrival.rows)
            self.made += 1
        x = np.array(numbers, np.float32)
        if self.schedule.sequence:
            x = np.repeat(x[:, None], arrivals[0].length, axis=1)
        return {"x": x}

    def compute(self, execution: Execution) -> None:
        execution.execute(DoublingSlot(self.schedule, execution.precision))
        members = [number for part in execution.parts for number in self._numbers(part.batch, part.span)]
        if execution.error is not None:
            assert set(members) & self.schedule.bad, execution.error
            self.disturbed.update(members)
        elif execution.precision != REFERENCE:
            self.disturbed.update(set(members) & self.schedule.spoiled)

    @staticmethod
    def _numbers(batch: RequestBatch, requests: Sequence[int]) -> list[int]:
        """The numbers of some of the requests of a batch."""
        start, stop = requests.start, requests.stop  # type: ignore[attr-defined]
        return [request.number for request in batch.tokens[start:stop]]

    def answer(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        expected = [
            2.0 * (ROWS * number + row)
            for number, index in zip(self._numbers(batch, requests), requests, strict=True)
            for row in range(batch.rows[index])
        ]
        assert answer.outputs["y"].tolist() == expected, "an answer holds other rows than its requests'"
        if answer.precision != REFERENCE:
            assert not set(self._numbers(batch, requests)) & self.schedule.spoiled

    def release(self, batch: RequestBatch) -> None:
        assert self.simulation is not None
        reading = [part.batch for execution in self.simulation.running for part in execution.parts]
        assert batch not in reading, "a batch was released while an execution read it"
        assert all(request.outcome for request in batch.tokens), (
            "a batch was released before its requests ended"
        )
        assert not batch.state.waiting
        self.released[id(batch)] += 1
        batch.inputs["x"][...] = -1.0

    def dispatch(self, now: float, simulation: Simulation, execution: Execution) -> None:
        """What must hold of an execution when it begins."""
        layout = simulation.batcher.layout
        assert 1 <= execution.rows <= execution.bucket <= layout.largest
        assert execution.rows == sum(part.rows for part in execution.parts)
        exact = simulation.batcher.curve(execution.precision, execution.shape).exact
        assert execution.bucket == execution.rows if exact else execution.bucket in layout.buckets
        latest_due: dict[int, float] = {}
        alone = False
        for batch, span, start, rows in execution.parts:
            starts = batch.state.starts
            for index in range(span.start, span.stop):
                request: SimulatedRequest = batch.tokens[index]
                assert request.outcome is None, "an ended request was executed"
                assert batch.deadlines is None or batch.deadlines[index] > now, (
                    "an expired request was executed"
                )
                first = max(starts[index], start)
                count = min(starts[index + 1], start + rows) - first
                if count < batch.rows[index]:
                    assert batch.rows[index] > layout.largest, "a request that fits was split"
                    assert len(span) == 1
                self.computed[request.number].append((first - starts[index], count))
            assert starts[span.start] <= start < start + rows <= starts[span.stop]
            assert span.retry in (None, REFERENCE)
            assert (span.retry or batch.precision or "int8", batch.state.shape) == (
                execution.precision,
                execution.shape,
            )
            alone = alone or span.alone
            latest_due[span.priority] = max(span.due, latest_due.get(span.priority, 0.0))
        assert not alone or execution.requests == 1, "a request that must run alone had company"
        for batch_queue in simulation.batcher.queue.batch_queues.values():
            if batch_queue.key == (execution.precision, execution.shape, alone):
                for priority, level in batch_queue.levels.items():
                    for waiting in level:
                        assert waiting.due >= latest_due.get(priority, 0.0), (
                            "an earlier deadline was passed over"
                        )

    def step(self, now: float, simulation: Simulation) -> None:
        """A slot is never idle while a request has waited its `max_queue_delay_s`; and all counts are right."""
        batcher = simulation.batcher
        queue = batcher.queue
        spans = list(queue)
        assert (
            queue.requests
            == sum(batch_queue.requests for batch_queue in queue.batch_queues.values())
            == sum(map(len, spans))
        )
        assert queue.rows == sum(batch_queue.rows for batch_queue in queue.batch_queues.values())
        assert queue.rows == sum(span.rows - span.taken for span in spans)
        for span in spans:
            assert len(span.batch.state.living(span.start, span.stop)) == 1, "an ended request waits"
            assert span in span.batch.state.waiting
        if not self.disturbed:  # what is computed anew may wait whatever waits
            assert queue.rows <= batcher.policy.queue_limit or queue.requests == 1
        if simulation.idle:
            for batch_queue in queue.batch_queues.values():
                held_back = now - batch_queue.oldest()
                assert held_back < batcher.policy.max_queue_delay_s, (
                    "a slot idles while a request has waited long enough"
                )

    def end(self, simulation: Simulation, trace: Trace) -> None:
        """Everything ended once, and was computed once unless there was a reason to compute it anew."""
        queue = simulation.batcher.queue
        assert (queue.requests, queue.rows, queue.batch_queues) == (0, 0, {})
        assert simulation.running == []
        totals = simulation.metrics.totals()
        assert totals.pop("admitted") == sum(totals.values())
        assert simulation.tracker.inflight == 0
        assert [self.released[id(batch)] for batch in trace.batches] == [1] * len(trace.batches)
        for number, request in enumerate(trace.requests):
            outcome, rows = request.outcome, sorted(self.computed.get(number, []))
            assert outcome in ("answered", "failed", "expired", "cancelled", "refused")
            assert outcome != "failed" or number in self.schedule.bad, "a good request failed"
            assert outcome != "answered" or number not in self.schedule.bad
            if number not in self.disturbed:
                ends = [start + count for start, count in rows]
                assert [start for start, _ in rows] == [0, *ends][: len(rows)], (
                    "rows were computed twice or skipped"
                )
                assert outcome != "answered" or ends[-1] == request.arrival.rows
            timeout_s = request.arrival.timeout_s
            if outcome == "answered" and timeout_s is not None:
                assert request.ended_at <= request.arrival.at + timeout_s
            if outcome == "refused":
                assert rows == []
                assert request.retry_after_s >= 0


def play(schedule: Schedule) -> Trace:
    """Runs a schedule and asserts, at every step, what must hold of the policy; returns what happened."""
    noise = Random(schedule.seed)
    curve = None
    if schedule.known_curve:
        curve = {b: schedule.fixed_s + b * schedule.row_s for b in default_buckets(schedule.largest)}
    batcher = make_batcher(schedule.largest, schedule.exact, schedule.policy, curve, schedule.sequence)

    def service(rows: int) -> float:
        stretch = 1 + schedule.noise * (2 * noise.random() - 1)
        return (schedule.fixed_s + rows * schedule.row_s) * stretch

    observed = Observed(schedule)
    simulation = observed.simulation = Simulation(
        batcher,
        schedule.slots,
        service,
        joined=schedule.joined,
        make_inputs=observed.make_inputs,
        compute=observed.compute,
        watch=observed.step,
        on_dispatch=observed.dispatch,
        on_answer=observed.answer,
        on_release=observed.release,
    )
    trace = simulation.run(schedule.arrivals)
    observed.end(simulation, trace)
    return trace
