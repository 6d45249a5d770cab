"""Memory that is used again: only once nobody can see it any more, and not more of it than was agreed."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from app.api.fast.memory import ALIGNMENT, BodyMemory

MIB = 2**20


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


@pytest.mark.parametrize("before", [0, 1, 64, 151, 4096])
def test_the_body_is_aligned_and_its_head_lies_before_it(before: int) -> None:
    memory = BodyMemory(4 * MIB)
    held = [memory.take(before, 100_000) for _ in range(3)]
    for view in held:
        assert len(view) == before + 100_000
        assert address(view[before:]) % ALIGNMENT == 0
        assert not view.readonly
    assert memory.take(before, 50) is not None


def test_what_was_let_go_is_used_again_and_what_is_held_is_not() -> None:
    memory = BodyMemory(4 * MIB)
    first = memory.take(0, MIB)
    second = memory.take(0, MIB)
    assert address(first) != address(second)
    place = address(second)
    del second
    assert address(memory.take(7, MIB - 7)[7:]) - place in range(2 * ALIGNMENT)
    assert memory.kept_bytes <= 4 * MIB


@pytest.mark.parametrize(
    "keep",
    [
        lambda view: np.ndarray((250,), np.float32, view[:1000].toreadonly()),
        lambda view: np.frombuffer(view, np.float32)[:250].reshape(5, 50)[1:],
        lambda view: [view[3:5]],
        lambda view: {"x": np.asarray(view).view(np.int16)},
    ],
    ids=["array", "slice of an array", "slice", "view"],
)
def test_whatever_shows_the_bytes_keeps_them(keep) -> None:
    memory = BodyMemory(8 * MIB)
    view = memory.take(0, 100_000)
    place = address(view)
    kept = keep(view)
    del view
    for _ in range(20):
        assert address(memory.take(0, 100_000)) != place
    del kept
    assert address(memory.take(0, 100_000)) == place


def test_kept_inputs_stay_as_they_were_while_others_come_and_go() -> None:
    """As requests do: some are looked at longer than others, and by another thread."""
    rng = random.Random(1)
    memory = BodyMemory(2 * MIB)
    held: list[tuple[int, np.ndarray]] = []
    wrong: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            try:
                n, array = held[rng.randrange(len(held))] if held else (0, np.zeros(1))
            except IndexError:
                continue
            if not (array == n).all():
                wrong.append(n)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for n in range(1, 3000):
        room = memory.take(100, rng.choice([70_000, 80_000, 300_000]))
        array = np.frombuffer(room, np.uint8)[100:]
        array[...] = n % 251
        held.append((n % 251, array[: rng.randrange(1, len(array))]))
        del room, array
        while len(held) > rng.randrange(1, 40):
            del held[rng.randrange(len(held))]
        assert memory.kept_bytes <= 2 * MIB
    stop.set()
    watcher.join()
    assert not wrong


def test_no_more_is_kept_than_was_agreed_and_other_sizes_find_room() -> None:
    memory = BodyMemory(MIB)
    held = [memory.take(0, 200_000) for _ in range(20)]
    assert len({address(view) for view in held}) == 20
    assert memory.kept_bytes <= MIB
    del held
    large = memory.take(0, 900_000)
    place = address(large)
    del large
    assert address(memory.take(0, 900_000)) == place
    assert memory.kept_bytes <= MIB
    assert len(memory.take(0, 3 * MIB)) == 3 * MIB
    assert memory.kept_bytes <= MIB
