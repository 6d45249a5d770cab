"""One package's plans on several GPUs, with members whose plans become ready when the test says so."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.engines import ArithmeticExecutor
from vernier.engine.plans.plan_group import PlanGroup
from vernier.engine.validated import ValidatedEngine, choose


class Member:
    """The plans of one GPU: `first` are ready when it starts, the others when `finish` is called."""

    def __init__(self, on_ready: Callable[[ValidatedEngine], None], curve_s: float, *first: str) -> None:
        self.on_ready = on_ready
        self.curve_s = curve_s
        self.first = first
        self.ready: dict[str, ValidatedEngine] = {}
        self.refused: dict[str, str] = {}
        self.pending: list[str] = []
        self.closed = False

    def engine(self, precision: str) -> ValidatedEngine:
        speed = self.curve_s / 2 if precision == "int8" else self.curve_s
        return ValidatedEngine(ArithmeticExecutor(precision), {1: speed, 8: 2 * speed})

    def start(self) -> None:
        self.ready = {precision: self.engine(precision) for precision in self.first}
        self.pending = [precision for precision in ("fp32", "int8") if precision not in self.first]

    def finish(self, precision: str) -> None:
        self.pending.remove(precision)
        self.ready[precision] = self.engine(precision)
        self.on_ready(self.ready[precision])

    def refuse(self, precision: str, reason: str) -> None:
        if precision in self.pending:
            self.pending.remove(precision)
        self.refused[precision] = reason

    def best(self) -> ValidatedEngine | None:
        name = choose(self.ready, "auto")
        return None if name is None else self.ready[name]

    def close(self) -> None:
        self.closed = True


class Group:
    def __init__(self, *first: list[str]) -> None:
        self.members: list[Member] = []
        self.joined: list[str] = []

        def make(place: int, on_ready: Callable[[ValidatedEngine], None]) -> Member:
            self.members.append(Member(on_ready, 0.001 * (place + 1), *first[place]))
            return self.members[-1]

        self.plans = PlanGroup(
            make, len(first), "auto", lambda engine: self.joined.append(engine.executor.precision)
        )
        self.plans.start()


def test_a_variant_serves_once_it_is_ready_on_every_gpu() -> None:
    group = Group(["fp32", "int8"], ["fp32"])
    assert list(group.plans.ready) == ["fp32"]
    assert group.plans.pending == ["int8"]
    group.members[1].finish("int8")
    assert group.joined == ["int8"]
    assert sorted(group.plans.ready) == ["fp32", "int8"]
    assert group.plans.pending == []
    best = group.plans.best()
    assert best is not None
    assert best.executor.precision == "int8"
    assert len(best.executor.parts) == 2


def test_the_curve_is_the_slower_gpus() -> None:
    group = Group(["fp32"], ["fp32"])
    assert dict(group.plans.ready["fp32"].curve) == {1: 0.002, 8: 0.004}


def test_nothing_is_told_before_the_start_is_over() -> None:
    group = Group([], [])
    assert group.plans.ready == {}
    group.members[0].finish("fp32")
    assert group.joined == []
    group.members[1].finish("fp32")
    assert group.joined == ["fp32"]


def test_what_one_gpu_refuses_is_refused_on_all() -> None:
    group = Group(["fp32"], ["fp32"])
    group.members[0].finish("int8")
    group.members[1].refuse("int8", "its self-test failed")
    assert list(group.plans.ready) == ["fp32"]
    assert group.plans.refused == {"int8": "GPU 2 of 2: its self-test failed"}
    assert group.plans.pending == []
    group.plans.close()
    assert all(member.closed for member in group.members)
