"""Sequential tests of a precision budget on live samples: pure, no clock, no threads.

A sample is over when its error is beyond the limit that the build proved. A bare threshold on one
sample would raise the alarm for what the budget allows; a mean would hide a broken tail. So the share of
samples over the limit is tested, one sample at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Share of samples over the limit that a sound variant may show, and the share that must be found.
SOUND_SHARE = 0.01
BROKEN_SHARE = 0.10


@dataclass(frozen=True, slots=True)
class Hypotheses:
    """Shares under which a variant is sound or broken, and the chances of judging wrongly."""

    sound: float = SOUND_SHARE
    broken: float = BROKEN_SHARE
    false_alarm: float = 1e-4
    missed: float = 1e-3

    @property
    def over(self) -> float:
        """Evidence for broken from one sample over the limit: the log of the likelihood ratio."""
        return math.log(self.broken / self.sound)

    @property
    def within(self) -> float:
        """The same from one sample within the limit; negative."""
        return math.log((1 - self.broken) / (1 - self.sound))


class DriftAlarm:
    """Page's cumulative sum test: Wald's sequential test, started again whenever it favours `sound`.

    On a sound variant an alarm comes less often than once in `1 / false_alarm` samples (E. S. Page,
    Continuous Inspection Schemes, Biometrika 41, 1954). With the defaults, four samples over the limit in a
    row raise it, and five among the last few dozen.
    """

    def __init__(self, hypotheses: Hypotheses | None = None) -> None:
        self._h = hypotheses or Hypotheses()
        self._threshold = math.log(1 / self._h.false_alarm)
        self.evidence = 0.0

    def add(self, over: bool) -> bool:
        """True when the samples so far say that the variant is broken."""
        self.evidence = max(0.0, self.evidence + (self._h.over if over else self._h.within))
        return self.evidence >= self._threshold

    def reset(self) -> None:
        self.evidence = 0.0


class RecoveryTest:
    """Wald's sequential test towards `sound`: True after sustained evidence, started again by a setback.

    With the defaults it takes 73 samples within the limit in a row (A. Wald, Sequential Tests of Statistical
    Hypotheses, 1945).
    """

    def __init__(self, hypotheses: Hypotheses | None = None) -> None:
        self._h = hypotheses or Hypotheses()
        self._threshold = math.log(self._h.missed)
        self.evidence = 0.0

    def add(self, over: bool) -> bool:
        self.evidence = min(self._h.over, self.evidence + (self._h.over if over else self._h.within))
        return self.evidence <= self._threshold

    def reset(self) -> None:
        self.evidence = 0.0
