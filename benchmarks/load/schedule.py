"""When requests are due, in an open loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Burst:
    """From `start_s` on, for `seconds`, the rate is `factor` times as high."""

    start_s: float
    seconds: float
    factor: float


def poisson(rate: float, seconds: float, *, seed: int = 0, bursts: Sequence[Burst] = ()) -> Times:
    """Arrival times of a Poisson process, in seconds from its start, ascending.

    Where bursts overlap their factors multiply. The number of arrivals is random, as it is in life.

    Args:
        rate: arrivals per second outside bursts.
        seconds: length of the schedule.
        seed: the same seed gives the same schedule.
    Raises:
        ValueError: when rate, seconds or a factor is not above 0.
    """
    if rate <= 0 or seconds <= 0 or any(burst.factor <= 0 for burst in bursts):
        raise ValueError("a schedule needs a rate, a length and factors above 0")
    generator = np.random.default_rng(seed)
    edges = sorted({0.0, seconds, *_edges(bursts, seconds)})
    parts = []
    for start, stop in pairwise(edges):
        middle = (start + stop) / 2
        factors = [b.factor for b in bursts if b.start_s <= middle < b.start_s + b.seconds]
        count = generator.poisson(rate * float(np.prod(factors)) * (stop - start))
        parts.append(
            np.sort(generator.uniform(start, stop, count))
        )  # given their number, arrivals are uniform
    return np.concatenate(parts)


def _edges(bursts: Sequence[Burst], seconds: float) -> list[float]:
    return [edge for b in bursts for edge in (b.start_s, b.start_s + b.seconds) if 0 < edge < seconds]
