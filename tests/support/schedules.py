"""Random schedules in virtual time, and what must hold of every one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from vernier.engine.base import default_buckets
from vernier.package.manifest import SequenceDim
from vernier.serving.admission import Policy
from vernier.serving.batcher import Batcher
from vernier.serving.batching import Decide, decide
from vernier.serving.execution import Batch
from vernier.serving.padding import BatchLayout
from vernier.serving.request import QUEUED, RUNNING, PendingRequest, RequestGroup
from vernier.serving.simulate import Arrival, Simulation, Trace
from vernier.tensors import TensorSpec

LENGTHS = [4, 16, 64]
PRECISIONS = ("fp32", "int8")
#: By a request's id: the first row and the number of rows of each execution.
Computed = dict[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class Schedule:
    """A model, a load and a machine."""

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
    grouped: bool = False


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
    grouped = random.random() < 0.5
    for _ in range(random.randint(1, 40)):
        at += 0.0 if random.random() < 0.2 else min(random.expovariate(rate), 100 / rate)
        arrival = _random_arrival(random, at, largest, fixed_s + largest * row_s, sequence)
        arrivals.append(arrival)
        for _ in range(random.choice([0, 0, 1, 5, 20]) if grouped else 0):
            cancelled = random.choice([None] * 6 + [random.random() * 3 * (fixed_s + largest * row_s)])
            rows = random.choice([arrival.rows, random.randint(1, largest)])
            arrivals.append(replace(arrival, cancel_after_s=cancelled, rows=rows))
    return Schedule(
        largest,
        random.random() < 0.5,
        sequence,
        slots,
        Policy(
            random.choice([0.0, 0.001, 0.01]),
            random.choice([None, None, 0.002, 0.02]),
            random.choice([2, 1000, 1000]),
            random.choice([0.005, 1.0]),
        ),
        fixed_s,
        row_s,
        random.choice([0.0, 0.1, 0.8]),
        random.random() < 0.7,
        tuple(arrivals),
        random.randrange(2**31),
        grouped,
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

    computed: Computed = {}

    def on_dispatch(now: float, simulation: Simulation, batch: Batch) -> None:
        _may_run(now, simulation, batch)
        for request, start, rows in _requests(batch):
            computed.setdefault(id(request), []).append((start, rows))

    simulation = Simulation(
        batcher,
        schedule.slots,
        service,
        grouped=schedule.grouped,
        watch=_nothing_is_held_back,
        on_dispatch=on_dispatch,
    )
    trace = simulation.run(schedule.arrivals)
    _everything_ended_once(simulation, trace, computed)
    return trace


def _requests(batch: Batch) -> list[tuple[PendingRequest, int, int]]:
    """Those of a batch that leaves, each for itself, with the first of its rows in it and how many they are."""
    found: list[tuple[PendingRequest, int, int]] = []
    for request, start, rows, _ in batch.parts:
        if isinstance(request, RequestGroup):
            assert (start, rows) == (0, request.rows)
            assert None not in request.requests, "one that has left was executed"
            assert sum(request.each) == rows
            members = zip(request.requests, request.each, strict=True)
            found += [(one, 0, own) for one, own in members if one is not None]
        else:
            found.append((request, start, rows))
    return found


def _may_run(now: float, simulation: Simulation, batch: Batch) -> None:
    """What must hold of a batch at the moment when it leaves."""
    layout = simulation.batcher.layout
    assert 1 <= batch.rows <= batch.bucket <= layout.largest
    assert batch.rows == sum(rows for _, _, rows, _ in batch.parts)
    exact = simulation.batcher.curve(batch.precision, batch.shape).exact
    assert batch.bucket == batch.rows if exact else batch.bucket in layout.buckets
    latest_due: dict[int, float] = {}
    for request, _, _ in _requests(batch):
        assert request.outcome is None, "an ended request was executed"  # type: ignore[attr-defined]
    for request, start, rows, _ in batch.parts:
        assert request.state in (QUEUED, RUNNING)
        assert request.deadline is None or request.deadline > now, "an expired request was executed"
        assert 0 <= start < start + rows <= request.rows
        assert rows == request.rows or request.rows > layout.largest, "a request that fits was split"
        assert (request.precision or "int8", request.shape) == (batch.precision, batch.shape)
        latest_due[request.priority] = max(request.due, latest_due.get(request.priority, 0.0))
    for lane in simulation.batcher.queue.lanes.values():
        if (lane.precision, lane.shape) == (batch.precision, batch.shape):
            for priority, level in lane.levels.items():
                for waiting in level:
                    assert waiting.due >= latest_due.get(priority, 0.0), "an earlier deadline was passed over"


def _nothing_is_held_back(now: float, simulation: Simulation) -> None:
    """A slot is never idle while a request has waited its `max_queue_delay_s`."""
    queue = simulation.batcher.queue
    assert queue.requests == sum(lane.requests for lane in queue.lanes.values())
    assert queue.requests <= simulation.batcher.policy.queue_limit
    if simulation.idle:
        held_back = simulation.batcher.policy.max_queue_delay_s
        for lane in queue.lanes.values():
            assert now < lane.oldest() + held_back, "a slot idles while a request has waited long enough"


def _everything_ended_once(simulation: Simulation, trace: Trace, computed: Computed) -> None:
    queue = simulation.batcher.queue
    assert (queue.requests, queue.rows, queue.lanes) == (0, 0, {})
    assert simulation.running == []
    for request in trace.requests:
        rows = sorted(computed.get(id(request), []))
        assert request.outcome in ("answered", "expired", "cancelled", "refused")
        ends = [start + count for start, count in rows]
        assert [start for start, _ in rows] == [0, *ends][: len(rows)], "rows were computed twice or skipped"
        if request.outcome == "answered":
            assert ends[-1] == request.rows
            assert request.deadline is None or request.ended_at <= request.deadline
        if request.outcome == "refused":
            assert rows == []
            assert request.retry_after_s >= 0
