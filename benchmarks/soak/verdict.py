"""Whether the figures of a soak grow: the statistical rule, stated once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

RULE = """The time is cut into 20 blocks; the first four warm up and are not judged. A figure **grows** when the slope
of a least-squares line through its blocks is above zero with 95 % confidence (two-sided interval by Student's t) *and*
the line climbs by more than the tolerance from the first judged block to the last: 1 % of the mean for memory, 10 % for
latency. Descriptors and threads are constant when the smallest count, what is left between two reloads, is the same in
every judged block."""
WARM_UP_BLOCKS = 4
MEMORY_TOLERANCE, LATENCY_TOLERANCE = 0.01, 0.10


@dataclass(frozen=True)
class Trend:
    """The line through a figure's blocks, in its unit for each block.

    Attributes:
        low, high: 95 % confidence interval of the slope.
        climb: what the line gains over the judged blocks, as a part of the mean.
    """

    slope: float
    low: float
    high: float
    start: float
    climb: float

    def grows(self, tolerance: float) -> bool:
        return self.low > 0 and self.climb > tolerance


def trend(values: Sequence[float]) -> Trend:
    """The trend of a figure by block; the warm-up is left out here."""
    judged = list(values[WARM_UP_BLOCKS:])
    fit = stats.linregress(range(len(judged)), judged)
    margin = float(stats.t.ppf(0.975, len(judged) - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    climb = slope * (len(judged) - 1) / statistics.fmean(judged)
    return Trend(slope, slope - margin, slope + margin, float(fit.intercept), climb)


@dataclass(frozen=True)
class Verdict:
    what: str
    passed: bool
    measured: str


def judge(rows: Sequence[dict[str, float]], errors: int, seconds: float, exit_code: int) -> list[Verdict]:
    """Args: rows: of the blocks, in order. seconds: that all of them took."""
    per_hour = 3600 / (seconds / len(rows))
    memory = trend([row["rss_mb"] for row in rows])
    verdicts = [
        Verdict("no error", errors == 0, f"{errors} of {sum(row['requests'] for row in rows):,.0f} requests"),
        Verdict(
            "memory does not grow",
            not memory.grows(MEMORY_TOLERANCE),
            f"{memory.slope * per_hour:+.1f} MB an hour "
            f"({memory.low * per_hour:+.1f} to {memory.high * per_hour:+.1f}), {memory.climb:+.2%} in all",
        ),
    ]
    for name in ("descriptors", "threads"):
        seen = sorted({row[name] for row in rows[WARM_UP_BLOCKS:]})
        verdicts.append(
            Verdict(f"{name} are constant", len(seen) == 1, ", ".join(f"{value:g}" for value in seen))
        )
    for name, unit in (("p50_ms", "median latency"), ("p99_ms", "99th percentile")):
        line = trend([row[name] for row in rows])
        mean = statistics.fmean(row[name] for row in rows[WARM_UP_BLOCKS:])
        verdicts.append(
            Verdict(
                f"{unit} is flat",
                not line.grows(LATENCY_TOLERANCE),
                f"{mean:.2f} ms, {line.climb:+.1%} in all",
            )
        )
    verdicts.append(Verdict("ends with 0 on SIGTERM", exit_code == 0, f"exit code {exit_code}"))
    return verdicts
