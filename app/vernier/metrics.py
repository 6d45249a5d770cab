"""Latency, queue and precision metrics, in Prometheus' words and beside them in Triton's.

The hot path touches plain Python numbers, once per batch where it can; `vernier.exposition` turns them
into metric families at each scrape. A ModelMetrics belongs to the event loop's thread; a
scrape may read a number one update early.

Invariant that tests read off `/metrics`:
    vernier_requests_admitted_total = sum over outcome of vernier_requests_ended_total,
    once vernier_inflight_requests is back at 0.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from typing import Callable, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

OUTCOMES = ("answered", "failed", "expired", "cancelled")
SAMPLE_RESULTS = ("within", "over", "dropped", "failed")
DISPATCH_REASONS = ("full", "delay", "deadline", "idle")

#: Seconds, 50 µs to 10 s: five steps a decade at the fast end, where objectives of engines lie.
DURATION_BOUNDS = (
    5e-5, 1e-4, 2e-4, 3.5e-4, 5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3, 3.5e-3, 5e-3, 7.5e-3, 0.01, 0.015, 0.02,
    0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
RATIO_BOUNDS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
ERROR_BOUNDS = (1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class StageSeconds(Protocol):
    """Seconds of one execution, by stage; `vernier.engine.base.StageTimes` is one."""

    @property
    def input(self) -> float: ...

    @property
    def infer(self) -> float: ...

    @property
    def output(self) -> float: ...


class BucketHistogram:
    """Counts per bound and a sum; `observe` is a bisection and two additions."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def observe_all(self, values: Sequence[float]) -> None:
        """`observe` for each; what lies close together, as the answers of a batch do, is counted in a few steps."""
        if not values:
            return
        bounds, counts = self.bounds, self.counts
        ordered = sorted(values)
        first, last, below = bisect_left(bounds, ordered[0]), bisect_left(bounds, ordered[-1]), 0
        for at in range(first, last):
            up_to = bisect_right(ordered, bounds[at], below)
            counts[at] += up_to - below
            below = up_to
        counts[last] += len(ordered) - below
        self.total += sum(ordered)

    def buckets(self) -> List[Tuple[str, float]]:
        seen = 0
        rows: List[Tuple[str, float]] = []
        for bound, count in zip([*[repr(float(b)) for b in self.bounds], "+Inf"], self.counts):
            seen += count
            rows.append((bound, float(seen)))
        return rows


class ServingSeries:
    """The histograms of one (precision, runtime) of one model version."""

    __slots__ = (
        "bucket_rows",
        "buckets",
        "executions",
        "fill",
        "predicted",
        "queue",
        "request",
        "requests",
        "requests_stages",
        "rows",
        "stages",
    )

    def __init__(self) -> None:
        self.request = BucketHistogram(DURATION_BOUNDS)
        self.queue = BucketHistogram(DURATION_BOUNDS)
        self.stages = {stage: BucketHistogram(DURATION_BOUNDS) for stage in ("input", "infer", "output")}
        #: Triton's way: every request is charged the whole execution that answered it.
        self.requests_stages = dict.fromkeys(self.stages, 0.0)
        self.predicted = BucketHistogram(DURATION_BOUNDS)
        self.rows = BucketHistogram(BATCH_BOUNDS)
        self.fill = BucketHistogram(RATIO_BOUNDS)
        self.executions = 0
        self.requests = 0
        self.bucket_rows = 0
        #: Rows computed, padding included → executions, and seconds of input, infer and output.
        self.buckets: Dict[int, List[float]] = {}


class ModelMetrics:
    """Everything counted for one model version. Made by `vernier.exposition.Metrics.model`."""

    def __init__(self, model: str, version: str) -> None:
        self.model = model
        self.version = version
        self._serving: Dict[Tuple[str, str], ServingSeries] = {}
        self._admitted = 0
        self._ended = dict.fromkeys(OUTCOMES, 0)
        self._dispatched = dict.fromkeys(DISPATCH_REASONS, 0)
        self._rejected: Dict[str, int] = {}
        self._codes: Dict[str, int] = {}
        self._queue_depth = 0
        self._inflight = 0
        self._last_execution_s: Optional[float] = None  # on the monotonic clock
        self._slots = {"idle": 0, "busy": 0, "failed": 0}
        self._launches: Callable[[], Tuple[int, int]] = lambda: (0, 0)
        self._nonfinite: Dict[str, int] = {}
        self._fallbacks: Dict[Tuple[str, str, str], int] = {}
        self._active: Tuple[str, str] = ("", "")
        self._known: List[str] = []
        self._engines: Dict[Tuple[str, str], Tuple[int, float]] = {}
        self._gate: Dict[Tuple[str, str, str], float] = {}
        self._budgets: Dict[Tuple[str, str], float] = {}
        self._errors: Dict[Tuple[str, str], BucketHistogram] = {}
        self._samples = dict.fromkeys(SAMPLE_RESULTS, 0)
        self._useful = 0
        self._padded = 0
        self._objective_s: Optional[float] = None

    # --- requests ---------------------------------------------------------------------------------
    def admitted(self, n: int = 1) -> None:
        self._admitted += n

    def ended(self, outcome: str, n: int = 1) -> None:
        """outcome: one of OUTCOMES; KeyError otherwise."""
        self._ended[outcome] += n

    def rejected(self, reason: str, n: int = 1) -> None:
        """Refused at admission, so never admitted: `queue_full`, `deadline`, `draining` …"""
        self._rejected[reason] = self._rejected.get(reason, 0) + n

    def responded(self, code: str, precision: str, runtime: str, seconds: float) -> None:
        """One response sent; `code` is `ok` or an error's code. Only `ok` enters the latency histogram."""
        if code == "ok":
            self.responded_ok(precision, runtime, (seconds,))
        else:
            self.responded_error(code)

    def responded_error(self, code: str, n: int = 1) -> None:
        """`responded` for errors of one kind."""
        self._codes[code] = self._codes.get(code, 0) + n

    def responded_ok(self, precision: str, runtime: str, seconds: Sequence[float]) -> None:
        """`responded` for good answers sent together, one duration for each."""
        self._codes["ok"] = self._codes.get("ok", 0) + len(seconds)
        self.serving(precision, runtime).request.observe_all(seconds)

    # --- batches ----------------------------------------------------------------------------------
    def serving(self, precision: str, runtime: str) -> ServingSeries:
        key = (precision, runtime)
        found = self._serving.get(key)
        if found is None:
            found = self._serving[key] = ServingSeries()
        return found

    def batch_done(
        self,
        precision: str,
        runtime: str,
        rows: int,
        bucket: int,
        requests: int,
        reason: str,
        queue_s: Sequence[float],
        times: StageSeconds,
        predicted_s: Optional[float] = None,
    ) -> None:
        """One execution: `rows` useful rows of `bucket` computed, for `requests` requests."""
        serving = self.serving(precision, runtime)
        serving.queue.observe_all(queue_s)
        stages = serving.stages
        stages["input"].observe(times.input)
        stages["infer"].observe(times.infer)
        stages["output"].observe(times.output)
        charged = serving.requests_stages
        charged["input"] += times.input * requests
        charged["infer"] += times.infer * requests
        charged["output"] += times.output * requests
        serving.rows.observe(rows)
        serving.fill.observe(rows / bucket)
        serving.executions += 1
        serving.requests += requests
        serving.bucket_rows += bucket
        spent = serving.buckets.get(bucket)
        if spent is None:
            spent = serving.buckets[bucket] = [0, 0.0, 0.0, 0.0]
        spent[0] += 1
        spent[1] += times.input
        spent[2] += times.infer
        spent[3] += times.output
        self._last_execution_s = time.monotonic()
        self._dispatched[reason] = self._dispatched.get(reason, 0) + 1
        if predicted_s is not None:
            serving.predicted.observe(predicted_s)

    def padding(self, useful_elements: int, padded_elements: int) -> None:
        """Elements sent by clients, and elements computed after padding."""
        self._useful += useful_elements
        self._padded += padded_elements

    def elements(self) -> Tuple[int, int]:
        """Input elements sent so far, and computed after padding."""
        return self._useful, self._padded

    def set_queue_depth(self, n: int) -> None:
        self._queue_depth = n

    def set_inflight(self, n: int) -> None:
        self._inflight = n

    def set_slots(self, idle: int, busy: int, failed: int = 0) -> None:
        self._slots = {"idle": idle, "busy": busy, "failed": failed}

    def set_latency_objective(self, seconds: Optional[float]) -> None:
        self._objective_s = seconds

    def watch_launches(self, source: Callable[[], Tuple[int, int]]) -> None:
        """`source` gives the executions so far by CUDA graph and without one, of every engine of the model."""
        self._launches = source

    def launches(self) -> Dict[str, int]:
        graph, plain = self._launches()
        return {"graph": graph, "plain": plain}

    # --- precision --------------------------------------------------------------------------------
    def engine_loaded(self, precision: str, runtime: str, size_bytes: int, seconds: float) -> None:
        self._engines[(precision, runtime)] = (size_bytes, seconds)
        if precision not in self._known:
            self._known.append(precision)

    def precision_active(self, precision: str, runtime: str) -> None:
        """The variant that new batches take."""
        self._active = (precision, runtime)

    def gate_error(self, precision: str, runtime: str, metrics: Mapping[str, float]) -> None:
        """What the gate measured when the package was built (or the self-test when it was loaded)."""
        for metric, value in metrics.items():
            self._gate[(precision, runtime, metric)] = value

    def precision_budget(self, precision: str, limits: Mapping[str, float]) -> None:
        for metric, value in limits.items():
            self._budgets[(precision, metric)] = value

    def precision_error(self, precision: str, metric: str, value: float) -> None:
        """The error of one live request against FP32."""
        histogram = self._errors.setdefault((precision, metric), BucketHistogram(ERROR_BOUNDS))
        histogram.observe(value)

    def precision_sample(self, result: str, n: int = 1) -> None:
        """result: `within`, `over`, `dropped` (the monitor was busy) or `failed`; KeyError otherwise."""
        self._samples[result] += n

    def fallback(self, from_: str, to: str, reason: str) -> None:
        key = (from_, to, reason)
        self._fallbacks[key] = self._fallbacks.get(key, 0) + 1

    def nonfinite_outputs(self, precision: str, n: int = 1) -> None:
        self._nonfinite[precision] = self._nonfinite.get(precision, 0) + n

    # --- for the log ------------------------------------------------------------------------------
    def totals(self) -> Dict[str, int]:
        """`admitted` and every outcome's count so far."""
        return {"admitted": self._admitted, **self._ended}
