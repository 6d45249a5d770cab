"""Connections under everything that clients do, on a wire and a clock of their own: one seed, one run.

When a world fails, its seed is printed; `VERNIER_SIMULATION_SEED=… pytest tests/simulation` plays that one alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Iterator

import pytest

from tests.simulation.clients import AFTER_ALL_S, Client
from tests.simulation.service import BUDGET_BYTES, Service
from tests.simulation.virtual import VirtualLoop

SEED = os.environ.get("VERNIER_SIMULATION_SEED")


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """The application fails on purpose."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def play(seed: int) -> int:
    """One service with a few clients, from start to end. Returns how many steps they took."""
    rng = random.Random(seed)
    guarded, tight, drains, stops = (rng.random() < share for share in (0.4, 0.2, 0.3, 0.5))
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        service = Service(loop, guarded)
        if tight:
            service.budget.limit = rng.choice([1, 10_000, 150_000])
        clients = [
            Client(service, random.Random(rng.random()), guarded, tight) for _ in range(rng.randint(1, 6))
        ]

        async def drain() -> None:
            await asyncio.sleep(rng.random() * 4)
            if rng.random() < 0.8:  # else the server stops by itself
                service.drain.draining = True
                await asyncio.sleep(rng.random() * 3)
            if stops:
                for connection in list(service.state.connections):
                    connection.shutdown()

        async def world() -> None:
            async with asyncio.timeout(AFTER_ALL_S), asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(client.run())
                if drains:
                    group.create_task(drain())
            await asyncio.sleep(AFTER_ALL_S)

        loop.run_until_complete(world())
        for number, client in enumerate(clients):
            try:
                client.check(drains, drains and stops)
            except AssertionError as error:
                told = f"client {number} ({client.kinds}, {client.pace}, {client.end})"
                raise AssertionError(f"{told}: {error}") from error
        assert not loop.faults, loop.faults
        assert not any(service.at_rest().values()), service.at_rest()
        assert service.budget.limit <= BUDGET_BYTES
        return sum(client.steps for client in clients)
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def play_until(steps: int, first: int) -> None:
    taken, seed = 0, first
    while taken < steps:
        try:
            taken += play(seed)
        except BaseException as error:
            raise AssertionError(f"VERNIER_SIMULATION_SEED={seed}: {error!r}") from error
        seed += 1


@pytest.mark.skipif(SEED is None, reason="plays one world again")
def test_one_world() -> None:
    assert SEED is not None
    play(int(SEED))


@pytest.mark.skipif(SEED is not None, reason="one world is played")
def test_fifty_thousand_steps() -> None:
    play_until(50_000, first=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_steps() -> None:
    play_until(1_000_000, first=1_000_000)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_is_the_same_run(seed: int) -> None:
    assert play(seed) == play(seed)
