"""Runs a plan, here or in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import uvloop

from benchmarks.load.loops import loop_of
from benchmarks.load.plans import Plan
from benchmarks.load.record import Record


async def run(plan: Plan) -> Record:
    """Runs the plan on this event loop. Raises ConnectionError when the server cannot be reached."""
    return await loop_of(plan).run()


def measure(plan: Plan, core: int | None = None) -> Record:
    """Runs the plan in a process of its own.

    Args:
        plan: what to send.
        core: the only one that the process may use; an open loop spins, so give it one that the server does not use.
    Raises:
        ConnectionError: when the server cannot be reached.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=pin, initargs=(core,)) as pool:
        return pool.submit(run_alone, plan).result()


def pin(core: int | Collection[int] | None) -> None:
    """Keeps this process, and those that it starts, on one core or on several."""
    if core is not None:
        os.sched_setaffinity(0, {core} if isinstance(core, int) else core)


def run_alone(plan: Plan) -> Record:
    """Runs the plan in this process, on an event loop of its own."""
    gc.disable()  # a collection would be a latency
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(plan))
