"""What a run of load saw: one row a request, and figures made from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

#: `Record.status` of requests without an answer.
DISCONNECTED = 0
UNANSWERED = -1


@dataclass(frozen=True)
class Summary:
    """Figures of a run. Percentiles are None when nothing was answered, or the driver does not know them.

    Attributes:
        driver: what made the load.
        seconds: length of the window that the rates refer to.
        requests: due (open loop) or ended (closed loop) in the window.
        rate: answers with a status of 2xx per second.
        goodput: of those, the ones that were right and within the objective, per second.
        p50_ms, p90_ms, p99_ms, p999_ms, max_ms: latency of the answers with 2xx and of requests without any answer,
            which count with the time that they were waited for: a lower bound.
        statuses: answers by status.
        errors: requests without an answer, by kind.
        checked, wrong: answers whose content was looked at, and those that were not right.
        waited: requests that found no free connection when they were due; the wait is in their latency.
        lag_p99_ms: how late the generator itself sent; close to the latencies, they are not to be trusted.
    """

    driver: str
    seconds: float
    requests: int
    rate: float
    goodput: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float | None
    statuses: dict[int, int]
    errors: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    wrong: int = 0
    waited: int = 0
    lag_p99_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON would have it."""
        return {**asdict(self), "statuses": {str(status): count for status, count in self.statuses.items()}}


@dataclass(frozen=True)
class Record:
    """Rows in the order in which the requests ended.

    Attributes:
        due_s: when each was to be sent, from the start of the run [n] float64.
        latency_s: from then until its answer was there, or until it was given up [n] float64.
        status: HTTP status; 0 when the connection broke, -1 when no answer came in time [n] int16.
        right: 1 when the answer was checked and right, 0 when it was wrong, -1 when not checked [n] int8.
        lag_s: how late it was sent, though a connection was free [n] float64.
        waited: whether it found no free connection [n] bool.
        window_s: start and end of the time that counts.
        is_open: whether rows belong to the window by when they were due (open loop) or ended (closed).
    """

    due_s: npt.NDArray[np.float64]
    latency_s: npt.NDArray[np.float64]
    status: npt.NDArray[np.int16]
    right: npt.NDArray[np.int8]
    lag_s: npt.NDArray[np.float64]
    waited: npt.NDArray[np.bool_]
    window_s: tuple[float, float]
    is_open: bool

    def __len__(self) -> int:
        return len(self.due_s)

    def between(self, start_s: float, stop_s: float) -> Record:
        """The part of the run from `start_s` to `stop_s`."""
        stamp = self.due_s if self.is_open else self.due_s + self.latency_s
        rows = (stamp >= start_s) & (stamp < stop_s)
        names = ("due_s", "latency_s", "status", "right", "lag_s", "waited")
        return replace(
            self, window_s=(start_s, stop_s), **{name: getattr(self, name)[rows] for name in names}
        )

    def after(self, warm_up_s: float) -> Record:
        """Without the first `warm_up_s` seconds."""
        return self.between(warm_up_s, self.window_s[1])

    def summary(self, objective_ms: float | None = None) -> Summary:
        """Figures of this record; see `Summary`."""
        seconds = self.window_s[1] - self.window_s[0]
        answered = (self.status >= 200) & (self.status < 300)
        good = answered & (self.right != 0)
        if objective_ms is not None:
            good &= self.latency_s * 1e3 <= objective_ms
        counted = self.latency_s[answered | (self.status <= 0)] * 1e3
        cuts: list[float | None] = [None] * 5
        if counted.size:
            cuts = [float(cut) for cut in np.percentile(counted, (50, 90, 99, 99.9, 100))]
        statuses, counts = np.unique(self.status, return_counts=True)
        by_status = dict(zip(statuses.tolist(), counts.tolist(), strict=True))
        kinds = {"disconnected": DISCONNECTED, "unanswered": UNANSWERED}
        return Summary(
            driver="benchmarks.load",
            seconds=seconds,
            requests=len(self),
            rate=int(answered.sum()) / seconds,
            goodput=int(good.sum()) / seconds,
            p50_ms=cuts[0],
            p90_ms=cuts[1],
            p99_ms=cuts[2],
            p999_ms=cuts[3],
            max_ms=cuts[4],
            statuses={status: count for status, count in by_status.items() if status > 0},
            errors={name: by_status[code] for name, code in kinds.items() if code in by_status},
            checked=int((self.right >= 0).sum()),
            wrong=int((self.right == 0).sum()),
            waited=int(self.waited.sum()),
            lag_p99_ms=float(np.percentile(self.lag_s, 99)) * 1e3 if len(self) else None,
        )
