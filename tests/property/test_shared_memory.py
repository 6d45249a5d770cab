"""What processes share: an arena, counts of limits, pages of running batches and of room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vernier.border.memory import running
from vernier.border.memory.arena import CHUNK_BYTES, MAX_BYTES, Arena, ArenaFull, create_memfd
from vernier.border.memory.limit_counts import STEPS, SharedCounts, bytes_for, forget_front
from vernier.border.memory.room import BYTES as ROOM_BYTES
from vernier.border.memory.room import MODELS, RoomPage
from vernier.border.memory.running import RunningBatches

SEEDS = st.integers(0, 2**32)


@contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = create_memfd("test", size)
    try:
        yield fd
    finally:
        os.close(fd)


# --- arena --------------------------------------------------------------------------------------------
def _handed_on(random: Random, array: np.ndarray) -> Any:
    """Something that shows the array's bytes and is not the array."""
    kind = random.randrange(6)
    if kind == 0:
        return array[len(array) // 2 :]
    if kind == 1:
        return memoryview(array)[1:]
    if kind == 2:
        return np.ndarray(len(array), np.int8, buffer=array)
    if kind == 3:
        return np.frombuffer(memoryview(array), np.uint8)[::2]
    if kind == 4:
        return array.view(np.int8).reshape(1, -1)
    return array


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_memory_is_never_handed_out_while_anything_shows_it(seed: int) -> None:
    random = Random(seed)
    with memfd(6 * CHUNK_BYTES) as fd:
        arena = Arena(fd, 6 * CHUNK_BYTES)
        base = arena._base
        kept: list[tuple[int, int, Any]] = []
        for _ in range(120):
            choice = random.random()
            if choice < 0.6 or not kept:
                region = random.random() < 0.2
                nbytes = random.choice([2, 64, 1000, CHUNK_BYTES // 3, CHUNK_BYTES])
                try:
                    array = arena.region(nbytes) if region else arena.take(nbytes)
                except ArenaFull:
                    array = None
                if array is None:
                    kept.pop(random.randrange(len(kept)))
                    continue
                assert array.nbytes == nbytes
                start = array.ctypes.data - base
                assert arena.offset_of(array) == start
                assert 0 <= start <= 6 * CHUNK_BYTES - nbytes
                for first, size, _shown in kept:
                    assert start + nbytes <= first or first + size <= start, "memory in use was handed out"
                shown = _handed_on(random, array)
                del array
                kept.append((start, nbytes, shown))
            else:
                kept.pop(random.randrange(len(kept)))
                shown = _shown = None
        kept.clear()
        shown = _shown = array = None
        assert all(chunk.is_free for chunk in arena._chunks)


def test_what_does_not_fit_is_refused() -> None:
    with memfd(CHUNK_BYTES) as fd:
        arena = Arena(fd, CHUNK_BYTES)
        with pytest.raises(ValueError):
            arena.take(MAX_BYTES + 1)
        kept = arena.take(MAX_BYTES)
        with pytest.raises(ArenaFull):
            arena.take(1)
        assert arena.region(1) is None
        del kept
        assert arena.take(1).nbytes == 1
        assert arena.offset_of(np.zeros(3)) is None


# --- limits -------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(1, 30), st.floats(0, 2**33))
def test_no_second_has_more_requests_than_the_limit_over_all_fronts(
    seed: int, fronts: int, limit: int, start: float
) -> None:
    random = Random(seed)
    clients = {"a": 0, "b": 1}
    with memfd(bytes_for(2, fronts)) as fd:
        counts = [SharedCounts(fd, clients, fronts, n) for n in range(fronts)]
        now, admitted, refused_since = start, [], 0.0
        for _ in range(600):
            now += random.choice([0.0, 0.001, 0.01, random.random() / STEPS, random.choice([0.0, 0.9, 3.0])])
            if random.choice(counts).spend("a", limit, now):
                admitted.append(now)
            else:
                recent = [time for time in admitted if time > now - 1 - 2 / STEPS]
                assert len(recent) >= limit, "a request within the limit was refused"
            assert len([time for time in admitted if time > now - 1]) <= limit
        assert counts[0].spend("b", 1, now), "clients share nothing"
        assert refused_since == 0.0


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60))
def test_what_runs_is_summed_and_a_dead_front_runs_nothing(moves: list[tuple[int, bool]]) -> None:
    with memfd(bytes_for(1, 3)) as fd:
        counts = [SharedCounts(fd, {"a": 0}, 3, n) for n in range(3)]
        running_now = [0, 0, 0]
        for front, begins in moves:
            if begins:
                counts[front].begin("a")
                running_now[front] += 1
            elif running_now[front]:
                counts[front].end("a")
                running_now[front] -= 1
            assert {count.running("a") for count in counts} == {sum(running_now)}
        forget_front(fd, 1, 3, 1)
        assert counts[0].running("a") == running_now[0] + running_now[2]


# --- pages --------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=150), st.integers(1, 50))
def test_what_runs_can_be_read_after_the_process_has_died(moves: list[tuple[bool, int]], slots: int) -> None:
    with memfd(running.BYTES) as fd:
        page, reader = RunningBatches(fd), RunningBatches(fd)
        del page._free[slots:]
        begun: set[int] = set()
        for begins, number in moves:
            if begins:
                page.begin(number)
                if number in begun or len(begun) < slots:
                    begun.add(number)
            else:
                page.end(number)
                begun.discard(number)
            assert reader.numbers() == begun


@given(st.integers(0, 3 * MODELS), st.integers(-(2**40), 2**40), st.floats(0, allow_infinity=True))
def test_room_is_read_as_it_was_published(model: int, rows: int, retry_after_s: float) -> None:
    with memfd(ROOM_BYTES) as fd:
        page, reader = RoomPage(fd), RoomPage(fd)
        assert reader.rows(model) > 2**60
        page.publish(model, rows, retry_after_s)
        assert reader.rows(model) == rows
        assert reader.retry_after_s(model) == pytest.approx(min(retry_after_s, 1e9), abs=2e-6)
        assert reader.rows(model + 1) > 2**60
