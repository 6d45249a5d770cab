"""Models that share a device get equal shares of its time."""

from __future__ import annotations

import heapq

import pytest

from vernier.serving.queueing.sharing import DeviceScheduler


class Model:
    """Always has work; its executions take `run_s`."""

    def __init__(self, device: DeviceScheduler, run_s: float, slots: int = 4) -> None:
        self.device = device
        self.run_s = run_s
        self.slots = slots
        self.used_s = 0.0
        self.running = 0
        self.wake_ups = 0

    def woken(self) -> None:
        self.wake_ups += 1


def simulate(
    device: DeviceScheduler, models: list[Model], seconds: float, starts: dict[int, float] | None = None
) -> None:
    """Everybody runs whenever the device lets them."""
    events: list[tuple[float, int]] = []
    now = 0.0
    while now < seconds:
        for i, model in enumerate(models):
            if now < (starts or {}).get(i, 0.0):
                continue
            while model.running < model.slots and device.may_run(model):
                device.started(model, model.run_s)
                model.running += 1
                heapq.heappush(events, (now + model.run_s, i))
        now, i = heapq.heappop(events)
        models[i].running -= 1
        models[i].used_s += models[i].run_s
        device.ended(models[i], models[i].run_s, models[i].run_s)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_a_model_with_short_runs_gets_as_much_time_as_one_with_long_runs(capacity: int) -> None:
    device = DeviceScheduler(capacity)
    models = [Model(device, 0.05), Model(device, 0.001)]
    simulate(device, models, 20.0)
    shares = [model.used_s / (20.0 * capacity) for model in models]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)


def test_nobody_saves_up_turns_while_idle() -> None:
    device = DeviceScheduler(1)
    models = [Model(device, 0.01), Model(device, 0.01)]
    simulate(device, models, 20.0, {1: 10.0})
    assert models[1].used_s == pytest.approx(5.0, abs=0.2)


def test_a_model_alone_is_limited_by_capacity_only() -> None:
    device = DeviceScheduler(2)
    model = Model(device, 0.01)
    simulate(device, [model], 1.0)
    assert model.used_s == pytest.approx(2.0, abs=0.05)


def test_a_denied_member_is_woken_and_one_that_changed_its_mind_blocks_nobody() -> None:
    device = DeviceScheduler(1)
    first, second, third = (Model(device, 1.0) for _ in range(3))
    assert device.may_run(first)
    device.started(first, 1.0)
    assert not device.may_run(second)
    assert not device.may_run(third)
    device.ended(first, 1.0, 1.0)
    assert second.wake_ups == 1
    device.nothing_to_run(second)
    assert third.wake_ups == 1
    assert device.may_run(third)


def test_room_for_two_wakes_two() -> None:
    """Two executions end before either of those that wait has asked again; each has one batch to run."""
    device = DeviceScheduler(2)
    first, second, third = (Model(device, 1.0) for _ in range(3))
    for _ in range(2):
        assert device.may_run(first)
        device.started(first, 1.0)
    assert not device.may_run(second)
    assert not device.may_run(third)
    device.ended(first, 1.0, 1.0)
    device.ended(first, 1.0, 1.0)
    assert device.may_run(second)
    device.started(second, 1.0)
    device.nothing_to_run(second)
    assert third.wake_ups == 1
    assert device.may_run(third)


def test_a_member_that_has_left_for_good_blocks_nobody() -> None:
    device = DeviceScheduler(1)
    first, second = Model(device, 1.0), Model(device, 1.0)
    assert device.may_run(first)
    device.started(first, 1.0)
    assert not device.may_run(second)
    device.ended(first, 1.0, 1.0)
    device.leave(second)
    assert device.may_run(first)
