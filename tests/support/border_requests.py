"""Requests of a simulation, and what each of them must see."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from tests.support.border import EngineModel, EngineSide, FrontSide
from tests.support.border_engine import factor, mark
from tests.support.virtual_loop import VirtualLoop
from vernier.border.batch import Answer, RequestBatch, cut
from vernier.errors import (
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineRestarting,
    QueueFull,
    UnknownVersion,
    UnsupportedPrecision,
    VernierError,
)


@dataclass(eq=False)
class Request:
    """What has happened to a request.

    Attributes:
        changes: how often the catalogue had changed when it was submitted, as far as its front knew.
        poisonous: whether it kills the engine process that runs it, mostly.
        running_deaths: engine processes that died while they ran it.
    """

    number: int
    rows: np.ndarray
    name: str
    version: int
    precision: str | None
    deadline: float | None
    front: FrontSide
    changes: int
    poisonous: bool
    ends: list[Any] = field(default_factory=list)
    cancelled: bool = False
    running_deaths: int = 0


class EnginePlace:
    """Where one engine process lives after the other.

    Attributes:
        engine: None while there is none.
        coming: when the next one starts.
        later: models that have not been loaded yet.
        leaving: models that are not served any more and still have requests.
        ready: generation of the catalogue that holds all models.
        reduced: whether the engine process has int8.
        tried: requests that it was given though an engine process had died of them.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.engine: EngineSide | None = None
        self.coming = 0.0
        self.later: list[EngineModel] = []
        self.leaving: list[EngineModel] = []
        self.ready = 0
        self.reduced = True
        self.tried: set[int] = set()
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def models(self) -> list[EngineModel]:
        return [*(self.engine.models if self.engine else ()), *self.leaving]

    def may_be_missed_by(self, front: FrontSide) -> bool:
        session = front.sessions.get(self.number)
        return self.engine is None or session is None or session.taken < self.ready

    def is_known_to(self, front: FrontSide) -> bool:
        """Whether a front knows what is served here."""
        engine, session = self.engine, front.sessions.get(self.number)
        if engine is None or engine.starting or session is None:
            return False
        told = [entry["number"] for entry in engine.fronts._told["models"]]
        served = [engine.fronts._number.get(id(model)) for model in engine.models]
        return session.taken == engine.fronts._generation and told == served


class Batch:
    """A target that checks whatever it is told."""

    def __init__(self, simulation: Any, requests: list[Request], inputs: np.ndarray) -> None:
        self.simulation = simulation
        self.requests = requests
        self.inputs = inputs
        self.releases = 0
        self.batch: RequestBatch | None = None
        self.model: Any = None

    def _ends(self, at: int, end: Any) -> Request:
        request = self.requests[at]
        assert not request.ends, "a request ended twice"
        assert not request.cancelled, "a cancelled request was told"
        assert self.releases == 0
        request.ends.append(end)
        return request

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        rows = [batch.rows[at] for at in requests]
        assert {len(array) for array in answer.outputs.values()} == {sum(rows)}
        assert tuple(answer.outputs) == tuple(batch.outputs)
        for at, outputs in zip(requests, cut(answer.outputs, rows), strict=True):
            request = self._ends(at, "answered")
            self.simulation.count("answered")
            assert request.precision in (None, answer.precision)
            self.simulation.check(request, answer.precision, outputs)
            if self.simulation.random.random() < 0.1:
                self.simulation.kept.append((request, answer.precision, outputs))

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        for at in requests:
            self.simulation.check_error(self._ends(at, error), error)

    def released(self, batch: RequestBatch) -> None:
        self.releases += 1
        assert self.releases == 1
        assert all(request.ends or request.cancelled for request in self.requests)
        self.inputs[...] = -1e6
        self.batch = None  # a cycle would keep the memory
        self.inputs = np.zeros(0)


class Expectations:
    """What a simulation knows of the world that its requests live in.

    Attributes:
        changes: how often a model has left, or become another.
        places: where engine processes live.
        kept: answers that somebody holds on to.
    """

    random: Random
    loop: VirtualLoop
    places: list[EnginePlace]
    changes: int
    queue_limit: int
    counts: dict[str, int]
    kept: list[tuple[Request, str, Any]]

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def check(self, request: Request, precision: str, outputs: Any) -> None:
        """The right rows of the right model."""
        for name, array in outputs.items():
            expected = (
                np.float32(factor(request.name, request.version)) * request.rows
                if name == "y"
                else request.rows + np.float32(mark(precision))
            )
            np.testing.assert_array_equal(array, expected, f"request {request.number} got a wrong answer")

    def check_error(self, request: Request, error: VernierError) -> None:
        """Each error has its reason."""
        kind = type(error)
        self.count(kind.__name__)
        if kind is EngineError:
            allowed = "two engine processes" in error.message and request.running_deaths >= 2
        elif kind is DeadlineExceeded:
            allowed = request.deadline is not None and request.deadline <= self.loop.now
        elif kind is EngineRestarting:
            allowed = any(place.may_be_missed_by(request.front) for place in self.places)
        elif kind in (UnknownVersion, Draining):
            allowed = self.changes > request.changes
        elif kind is QueueFull:
            allowed = self.queue_limit < 10**6
        elif kind is UnsupportedPrecision:
            allowed = request.precision == "int8" and not all(place.reduced for place in self.places)
        else:
            allowed = False
        assert allowed, (request, error)
