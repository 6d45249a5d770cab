"""What a run of load is to do. Plans are plain data: they travel to the process that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.load.calls import Call
from benchmarks.load.schedule import Burst


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    Attributes:
        calls: sent in turns.
        seconds: length of the run.
        connections: kept open; a closed loop keeps each of them busy.
        check_every: every how manyth answer is checked. Bodies are kept and checked when the load has ended.
        grace_s: how long answers that are still missing at the end are waited for.
    """

    host: str = "127.0.0.1"
    port: int
    calls: Sequence[Call]
    seconds: float
    connections: int = 64
    check_every: int = 1
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.calls or self.connections < 1 or self.seconds <= 0 or self.check_every < 1:
            raise ValueError("a plan needs calls, connections, seconds and check_every above 0")


@dataclass(frozen=True, kw_only=True)
class ClosedLoop(Plan):
    """Each connection sends its next request when the last one is answered."""


@dataclass(frozen=True, kw_only=True)
class OpenLoop(Plan):
    """Requests are sent when a Poisson process says so.

    Attributes:
        rate: requests per second.
        bursts: times of a higher rate.
        seed: of the schedule.
    """

    rate: float
    bursts: tuple[Burst, ...] = ()
    seed: int = 0
