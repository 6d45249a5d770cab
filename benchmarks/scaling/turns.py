"""The order of a run: what is measured when, what came of it, and when there is no time for more."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.workloads import Workload
from benchmarks.processes import StartError
from benchmarks.scaling.cases import CASES, Case
from benchmarks.scaling.contestants import Contestant
from benchmarks.scaling.sessions import Ask, Cores, measure_session

#: What a session takes besides measuring, until one like it was seen: the start and the end, and each case's check.
START_S, CHECK_S = 5.0, 1.5
_TRIAL_S = 1.0


@dataclass(frozen=True)
class Session:
    """One server with one number of processes, in cases of one workload, on so many cores."""

    contestant: Contestant
    size: int
    processes: int
    cases: tuple[Case, ...]

    @property
    def workload(self) -> str:
        return self.cases[0].workload

    @property
    def name(self) -> str:
        cores = "one core" if self.size == 1 else f"{self.size} cores"
        return f"{self.contestant.peer.title}, {cores}, {self.workload}"


@dataclass
class Clock:
    """Tells what still fits.

    Args:
        limit_s: of the whole run; None for no limit.
    """

    limit_s: float | None
    now: Callable[[], float] = time.monotonic
    _took: dict[tuple[str, int, str, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = self.now()

    def fits(self, session: Session, seconds: float) -> bool:
        """Whether the session will probably end in time; `seconds` is the length of a measurement."""
        if self.limit_s is None:
            return True
        guess = self._took.get(_kind(session), START_S + len(session.cases) * (seconds + CHECK_S))
        return self.now() - self._began + 1.1 * guess <= self.limit_s

    def note(self, session: Session, took_s: float) -> None:
        kind = _kind(session)
        self._took[kind] = max(took_s, self._took.get(kind, 0.0))


def _kind(session: Session) -> tuple[str, int, str, int]:
    return session.contestant.name, session.size, session.workload, len(session.cases)


@dataclass
class Turns:
    """A run in progress.

    Args:
        workloads: by name.
        sizes: for each number of cores the cases.
        cores: all that servers may use, and the load's.
        seconds: of one measurement.
        clock: ends the run early.
        chosen: numbers of processes that are known already, by server, number of cores and case.
        say: gets a word on what goes on.
    """

    contestants: Sequence[Contestant]
    workloads: Mapping[str, Workload]
    sizes: Mapping[int, Sequence[Case]]
    cores: Cores
    seconds: float
    ask: Ask
    clock: Clock
    say: Callable[[str], None]
    chosen: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    _gone: set[tuple[str, int, str]] = field(default_factory=set)

    def choose(self) -> bool:
        """Tries every number of processes where there are several. Returns whether the time sufficed for all."""
        for contestant in self.contestants:
            for size, cases in self.sizes.items():
                counts = list(contestant.processes(size))
                missing = [case for case in cases if self._choice(contestant, size, case) not in counts]
                if len(counts) == 1:
                    self._keep(contestant, size, {case.name: counts[0] for case in missing})
                elif missing and not self._try(contestant, size, counts, missing):
                    return False
        return True

    def round(self, number: int) -> bool:
        """Measures everything once. Returns whether the time sufficed for all."""
        for session in self.sessions(number):
            figures = self._measure(session, self.seconds, f"round {number}", is_trial=False)
            if figures is None:
                return False
            place = {"size": session.size, "server": session.contestant.name, "processes": session.processes}
            for case, found in figures.items():
                self.cells.append({**place, "case": case, "round": number, **found})
        return True

    def sessions(self, number: int) -> list[Session]:
        """Of a round: the most cores first, and in each round another server first."""
        found = []
        shift = (number - 1) % max(1, len(self.contestants))
        order = [*self.contestants[shift:], *self.contestants[:shift]]
        for size in sorted(self.sizes, reverse=True):
            for workload in dict.fromkeys(case.workload for case in self.sizes[size]):
                for contestant in order:
                    groups: dict[int, list[Case]] = {}
                    for case in self.sizes[size]:
                        if case.workload == workload:
                            count = self._choice(contestant, size, case)
                            if count is not None:
                                groups.setdefault(count, []).append(case)
                    found += [
                        Session(contestant, size, count, tuple(cases)) for count, cases in groups.items()
                    ]
        return [session for session in found if self._key(session) not in self._gone]

    def _try(self, contestant: Contestant, size: int, counts: Sequence[int], cases: Sequence[Case]) -> bool:
        for workload in dict.fromkeys(case.workload for case in cases):
            rates: dict[str, dict[int, float]] = {}
            for count in counts:
                alike = tuple(case for case in cases if case.workload == workload)
                session = Session(contestant, size, count, alike)
                found = self._measure(session, _TRIAL_S, f"tried with {count} processes", is_trial=True)
                if found is None:
                    return False
                for case, figures in found.items():
                    rates.setdefault(case, {})[count] = figures["rate"]
            self._keep(
                contestant, size, {case: max(tried, key=tried.__getitem__) for case, tried in rates.items()}
            )
        return True

    def _measure(
        self, session: Session, seconds: float, what: str, *, is_trial: bool
    ) -> dict[str, dict[str, Any]] | None:
        """Figures by case, none when it failed; None when there is no time for it.

        Whoever failed is not measured again, unless it was a trial.
        """
        if self._key(session) in self._gone:
            return {}
        if not self.clock.fits(session, seconds):
            return None
        self.say(f"{session.name}: {what}")
        began = self.clock.now()
        cores = Cores(self.cores.server[: session.size], self.cores.load)
        load = self.workloads[session.workload]
        try:
            return measure_session(
                session.contestant, load, session.cases, cores, session.processes, seconds, self.ask
            )
        except (StartError, OSError) as error:
            self.failed[session.name] = f"{what}: {error}"
            if not is_trial:
                self._gone.add(self._key(session))
            return {}
        finally:
            self.clock.note(session, self.clock.now() - began)

    def _choice(self, contestant: Contestant, size: int, case: Case) -> int | None:
        return self.chosen.get(contestant.name, {}).get(str(size), {}).get(case.name)

    def _keep(self, contestant: Contestant, size: int, counts: Mapping[str, int]) -> None:
        self.chosen.setdefault(contestant.name, {}).setdefault(str(size), {}).update(counts)

    @staticmethod
    def _key(session: Session) -> tuple[str, int, str]:
        return session.contestant.name, session.size, session.workload


def steps(contestants: Sequence[Contestant], sizes: Mapping[int, Sequence[Case]], rounds: int) -> int:
    """About how often `say` is called."""
    found = 0
    for contestant in contestants:
        for size, cases in sizes.items():
            workloads = len({CASES[case.name].workload for case in cases})
            counts = len(list(contestant.processes(size)))
            found += workloads * (rounds + (counts if counts > 1 else 0))
    return found
