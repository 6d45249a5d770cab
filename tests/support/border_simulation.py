"""Random lives of fronts and engine processes in virtual time, from one seed, and what each request must see."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.support.border import EngineModel, EngineSide, FrontSide, arithmetic_manifest, kill, stall
from tests.support.border_engine import (
    ROWS,
    ManualScheduler,
    factor,
    numbers_of,
)
from tests.support.border_requests import Batch, EnginePlace, Expectations, Request
from tests.support.virtual_loop import VirtualLoop
from vernier.border.batch import RequestBatch
from vernier.border.front_side import remote
from vernier.border.memory import arena as arenas
from vernier.border.memory import placement
from vernier.errors import (
    NotReady,
    UnknownModel,
)

#: So that memory is used again and again.
_CHUNK = 2048
NAMES = ("a", "bb", "ccc")
PRECISIONS = ("fp32", "int8")


class Simulation(Expectations):
    """One run.

    Attributes:
        changes: how often a model has left, or become another.
        deaths: of engine processes.
        kept: answers that somebody holds on to.
    """

    def __init__(self, seed: int, loop: VirtualLoop, engines: int = 1) -> None:
        self.random = Random(seed)
        self.loop = loop
        self.changes = self.deaths = 0
        self.kept: list[tuple[Request, str, Any]] = []
        self.requests: list[Request] = []
        self.open: list[Batch] = []
        self.batches: list[Batch] = []
        self.places = [EnginePlace(number) for number in range(engines)]
        self.stalled: list[Callable[[], None]] = []
        self.held_limit = self.random.choice([5, 40, 10**6])
        self.queue_limit = self.random.choice([5, 40, 10**6])
        self.chunks = self.random.choice([1, 8, 32])
        self.shapes = dict.fromkeys(NAMES, 2)
        self.counts: dict[str, int] = {}
        loop.set_exception_handler(self._fault)
        self.faults: list[dict[str, Any]] = []
        self.fronts = [self._front() for _ in range(self.random.randint(1, 3))]
        for place in self.places:
            self._start_engine(place)

    def _fault(self, loop: Any, context: dict[str, Any]) -> None:
        self.faults.append(context)

    # --- engine processes ------------------------------------------------------------------------
    def _model(self, place: EnginePlace, name: str, version: int = 1) -> EngineModel:
        size = self.shapes[name]
        manifest = arithmetic_manifest(
            name,
            version,
            inputs=[{"name": "x", "dtype": "float32", "shape": ["batch", size]}],
            outputs=[{"name": n, "dtype": "float32", "shape": ["batch", size]} for n in ("y", "z")],
            variants={p: {"precision": p, "files": ["fp32.onnx"]} for p in PRECISIONS},
        )
        loaded = PRECISIONS if place.reduced else PRECISIONS[:1]
        scheduler = ManualScheduler(factor(name, version), self.loop.time, loaded, self.queue_limit)
        scheduler.on_submit = partial(self._on_submit, place)
        return EngineModel(manifest, scheduler, loaded)

    def _on_submit(self, place: EnginePlace, batch: RequestBatch) -> None:
        if batch.deadlines is not None and min(batch.deadlines) <= self.loop.now and len(batch) == 1:
            return  # it will not run
        numbers = numbers_of(batch)
        tries = [self.requests[number].running_deaths for number in numbers]
        assert max(tries) < 2, "a request that ran at two deaths ran again"
        if max(tries) == 1:
            assert len(numbers) == 1, "a suspect had company in its batch"
            for model in place.engine.models if place.engine else ():
                for other in model.scheduler.batches:
                    for number in numbers_of(other) - numbers:
                        assert self.requests[number].running_deaths == 0 or number not in place.tried, (
                            "two suspects ran at a time"
                        )
            place.tried.update(numbers)

    def _start_engine(self, place: EnginePlace) -> None:
        names = list(NAMES)
        if self.deaths and self.random.random() < 0.3:
            names.remove(self.random.choice(names))
            self.changes += 1
        if self.deaths and self.random.random() < 0.3:
            self._change_shape(self.random.choice(NAMES))
            self.changes += 1
        self.random.shuffle(names)
        place.reduced = self.random.random() < 0.8
        place.tried = set()
        place.later = [self._model(place, name) for name in names]
        place.engine = EngineSide()
        place.ready = 10**9
        place.engine.starting = True
        place.engine.reason = "loading"
        place.engine.awaited = {name: [1] for name in names}
        for front in self.fronts:
            front.meet(place.engine, self.random.choice([1, 8, 32]), number=place.number)

    def _change_shape(self, name: str) -> None:
        """Two engine processes serve the same."""
        if len(self.places) == 1:
            self.shapes[name] = 5 - self.shapes[name]

    def _load_next(self, place: EnginePlace) -> None:
        engine = place.engine
        assert engine is not None
        if place.later:
            model = place.later.pop()
            engine.models.append(model)
            del engine.awaited[model.name]
        if not place.later:
            engine.starting, engine.reason = False, None
        engine.fronts.publish()
        if not engine.starting:
            place.ready = engine.fronts._generation

    def _kill_engine(self, place: EnginePlace) -> None:
        engine = place.engine
        assert engine is not None
        self.count("death")
        for model in place.models:
            for batch in model.scheduler.begun:
                for number in numbers_of(batch):
                    request = self.requests[number]
                    if not request.ends and not request.cancelled:
                        request.running_deaths += 1
        self.deaths += 1
        for session in list(engine.fronts._sessions):
            kill(session)
        engine.fronts._sessions.clear()
        for task in place.tasks:
            task.cancel()
        place.tasks.clear()
        engine.fronts.last_tries._waiting.clear()
        engine.close()
        place.leaving.clear()
        place.engine = None
        place.coming = self.loop.now + self.random.choice([0.0, 0.0, 0.01, 0.1])

    def _all_models(self) -> list[EngineModel]:
        return [model for place in self.places for model in place.models]

    def _step_engine(self, place: EnginePlace) -> None:
        engine, random = place.engine, self.random
        if engine is None:
            if self.loop.now >= place.coming:
                self._start_engine(place)
            return
        models = place.models
        if not models:
            self._load_next(place)
            return
        scheduler = random.choice(models).scheduler
        choice = random.random()
        if choice < 0.5:
            execution = scheduler.begin(random.choice([1, 3, 100]))
            if execution is not None and random.random() < 0.7:
                numbers = numbers_of(execution.batch)
                if any(self.requests[number].poisonous for number in numbers):
                    self._kill_engine(place)
                    return
        elif scheduler.running:
            scheduler.finish(random.choice(scheduler.running))
        if engine.starting and random.random() < 0.6:
            self._load_next(place)
        for model in list(place.leaving):
            if model.scheduler.draining and not model.scheduler.batches:
                place.leaving.remove(model)

    def _change_catalogue(self, place: EnginePlace) -> None:
        """Unloads, loads or reloads a model, as a repository does."""
        engine, random = place.engine, self.random
        if engine is None or engine.starting:
            return
        self.count("change")
        name = random.choice(NAMES)
        served = next((model for model in engine.models if model.name == name), None)
        if served is None or random.random() < 0.5:
            if served is not None and random.random() < 0.5:
                self._change_shape(name)
            engine.models.append(self._model(place, name))
        if served is not None:
            engine.models.remove(served)
            place.leaving.append(served)
            place.tasks.append(self.loop.create_task(self._retire(engine, served)))
            self.changes += 1
        if random.random() < 0.5:  # else a while later
            engine.fronts.publish()

    async def _retire(self, engine: EngineSide, model: EngineModel) -> None:
        await engine.fronts.retire(model)
        model.scheduler.draining = True

    # --- fronts -----------------------------------------------------------------------------------
    def _front(self) -> FrontSide:
        return FrontSide(self.chunks, self.held_limit, self.loop.time, len(self.places))

    def _kill_front(self) -> None:
        self.count("front death")
        at = self.random.randrange(len(self.fronts))
        front = self.fronts[at]
        self._forget(front)
        self.fronts[at] = fresh = self._front()
        for place in self.places:
            if place.engine is not None:
                fresh.meet(place.engine, number=place.number)

    def _forget(self, front: FrontSide) -> None:
        """It dies with all of its requests."""
        for engine in front.group.engines:
            engine.others = ()
            if engine._channel is not None:
                kill(engine)  # type: ignore[arg-type]
            for handle in (engine._expiring, engine._answers and engine._answers._timer):
                if handle is not None:
                    handle.cancel()
        os.close(front.memory)
        self.open = [batch for batch in self.open if batch.requests[0].front is not front]
        self.batches = [batch for batch in self.batches if batch.requests[0].front is not front]
        self.kept = [kept for kept in self.kept if kept[0].front is not front]

    def _submit(self) -> None:
        random = self.random
        front, name = random.choice(self.fronts), random.choice(NAMES)
        try:
            model = front.group.resolve(name, None)
        except (UnknownModel, NotReady):
            return
        deadline_s = random.choice([None, None, 0.005, 0.05, 1.0])
        precision = random.choice([None, None, *PRECISIONS])
        count = random.choice([1, 1, 1, 2, 5, 30])
        changes = self.changes if all(place.is_known_to(front) for place in self.places) else -1
        size = model.signature.inputs["x"].shape[1]
        requests, arrays = [], []
        for _ in range(count):
            rows = random.randint(1, ROWS)
            number = len(self.requests)
            array = np.zeros((rows, size), np.float32)
            array[:, 0] = ROWS * number + np.arange(rows)
            array[:, 1] = random.random()
            deadline = None if deadline_s is None else self.loop.now + deadline_s * random.random()
            poisonous = random.random() < 0.01
            made = Request(number, array, name, 1, precision, deadline, front, changes, poisonous)
            self.requests.append(made)
            requests.append(made)
            arrays.append(array)
        together = np.concatenate(arrays)
        inputs = together
        if random.random() < 0.5:
            memory = self._arena_memory(front, together.nbytes)
            if memory is not None:
                inputs = memory.view(np.float32).reshape(together.shape)
                inputs[...] = together
        target = Batch(self, requests, inputs)
        outputs = random.choice([("y", "z"), ("z",), ("z", "y")])
        deadlines = None if deadline_s is None else [request.deadline for request in requests]
        rows_of = [len(array) for array in arrays]
        batch = RequestBatch(
            {"x": inputs}, rows_of, outputs, precision, 0, [self.loop.now] * count, deadlines, target
        )
        target.batch, target.model = batch, model
        self.open.append(target)
        self.batches.append(target)
        model.scheduler.submit(batch)

    @staticmethod
    def _arena_memory(front: FrontSide, nbytes: int) -> Any:
        try:
            return front.arena.take(nbytes)
        except (MemoryError, ValueError):  # it is full, or a chunk is smaller
            return None

    def _cancel(self) -> None:
        self.open = [batch for batch in self.open if not batch.releases]
        if self.open:
            batch = self.random.choice(self.open)
            at = self.random.randrange(len(batch.requests))
            request = batch.requests[at]
            if not request.ends:
                request.cancelled = True
            assert batch.batch is not None
            batch.model.scheduler.cancel(batch.batch, at)

    def _stall(self) -> None:
        if self.stalled and self.random.random() < 0.6:
            self.stalled.pop()()
            return
        front = self.random.choice(self.fronts)
        channels = [engine._channel for engine in front.group.engines]
        channels += [session._channel for session in front.sessions.values()]
        open_ends = [channel for channel in channels if channel is not None and not channel.closed]
        if open_ends:
            self.stalled.append(stall(self.random.choice(open_ends)))

    # --- the run ----------------------------------------------------------------------------------
    def _expire(self) -> None:
        for model in self._all_models():
            model.scheduler.expire()

    async def run(self, steps: int) -> None:
        random = self.random
        for _ in range(steps):
            choice = random.random()
            if choice < 0.3:
                self._submit()
            elif choice < 0.36:
                self._cancel()
            elif choice < 0.8:
                self._step_engine(random.choice(self.places))
            elif choice < 0.9:
                self.loop.now += random.choice([0.0001, 0.001, 0.02])
                for place in self.places:
                    if place.engine is not None and not place.engine.starting:
                        place.engine.fronts.publish()
                self._expire()
            elif choice < 0.93:
                self._stall()
            elif choice < 0.95:
                self._change_catalogue(random.choice(self.places))
            elif choice < 0.96:
                place = random.choice(self.places)
                if place.engine is not None:
                    self._kill_engine(place)
            elif choice < 0.965:
                self._kill_front()
            elif self.kept:
                self.check(*self.kept.pop(random.randrange(len(self.kept))))
            for _ in range(random.choice([0, 0, 1, 2, 5])):
                await asyncio.sleep(0)
            assert not self.faults, self.faults[0]
        await self._end()

    async def _end(self) -> None:
        """Everything that is open ends, and all memory comes back."""
        for go_on in self.stalled:
            go_on()
        for _ in range(10_000):
            for place in self.places:
                self._step_engine(place)
                if place.engine is not None and place.engine.starting:
                    self._load_next(place)
                elif place.engine is not None:
                    place.engine.fronts.publish()
            for model in self._all_models():
                for execution in list(model.scheduler.running):
                    model.scheduler.finish(execution)
            await asyncio.sleep(0.001)
            self._expire()
            assert not self.faults, self.faults[0]
            if self._quiet():
                break
        assert [batch for batch in self.batches if batch.releases != 1] == []
        while self.kept:
            self.check(*self.kept.pop())
        await asyncio.sleep(1)
        for front in self.fronts:
            for engine in front.group.engines:
                assert engine.open_requests == engine.open_rows == 0
                assert not engine._open
                assert len(engine._held) == engine._held.rows == 0
            for session in front.sessions.values():
                assert session._channel.closed or not session._unread, "memory of answers was lost"
            for metrics in front.metrics._models.values():
                totals = metrics.totals()
                assert totals.pop("admitted") == sum(totals.values())
                assert metrics._inflight == 0
        self.open.clear()
        self.batches.clear()
        for front in self.fronts:
            free = front.free_chunks
            assert free == self.chunks, f"{self.chunks - free} chunks of an arena are in use for ever"

    def _quiet(self) -> bool:
        running = all(place.engine is not None and not place.engine.starting for place in self.places)
        waiting = any(model.scheduler.batches for model in self._all_models())
        return running and not waiting and all(batch.releases for batch in self.batches)

    def close(self) -> None:
        for place in self.places:
            for task in place.tasks:
                task.cancel()
            if place.engine is not None:
                place.engine.close()
        for front in self.fronts:
            front.close()


def simulate(seed: int, steps: int, engines: int = 1) -> dict[str, int]:
    """Plays a run; AssertionError when anything is not as it must be. Returns how often what happened."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)

    async def play() -> dict[str, int]:
        simulation = Simulation(seed, loop, engines)
        try:
            await simulation.run(steps)
        finally:
            simulation.close()
            await asyncio.sleep(0)
        return simulation.counts

    try:
        with (
            patch.multiple(arenas, CHUNK_BYTES=_CHUNK, MAX_BYTES=_CHUNK),
            patch.object(placement, "MAX_BYTES", _CHUNK),
            patch.object(remote, "_SUSPECTS_WAIT_S", 0.05),
        ):
            return loop.run_until_complete(play())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
