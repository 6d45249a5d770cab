"""Memory that is used again: only once nobody can see it any more, and not more of it than was agreed."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import numpy as np
import pytest

from vernier.front.buffers import ALIGNMENT, MOST_BEFORE, BodyBufferPool, neighbours

MIB = 2**20


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


@pytest.mark.parametrize("before", [0, 1, 64, 151, MOST_BEFORE])
def test_a_body_is_aligned_and_its_head_lies_before_it(before: int) -> None:
    memory = BodyBufferPool(4 * MIB)
    held = [memory.take(before, 100_000 // ALIGNMENT * ALIGNMENT) for _ in range(3)]
    for room in held:
        assert len(room.view) == before + 100_000 // ALIGNMENT * ALIGNMENT
        assert address(room.view[before:]) % ALIGNMENT == 0
        assert not room.view.readonly
    for size in (100_001, 5_000):  # of any size the first one is
        assert address(memory.take(before, size).view[before:]) % ALIGNMENT == 0


def test_bodies_that_come_one_after_the_other_lie_side_by_side() -> None:
    memory = BodyBufferPool(16 * MIB)
    size = 602_112
    rooms = [memory.take(before, size) for before in (130, 131, 0, 4096, 7, 130, 130)]
    for n, (room, before) in enumerate(zip(rooms, (130, 131, 0, 4096, 7, 130, 130), strict=True)):
        room.view[:before] = b"h" * before  # as a head does, before the next body comes
        room.view[before:] = bytes([n]) * size
    assert [room.is_last for room in rooms] == [False] * 5 + [True, False]
    for earlier, later in pairwise(rooms[:6]):
        assert earlier.is_above(later)
        assert not later.is_above(earlier)
    assert not rooms[5].is_above(rooms[6])
    below = neighbours(rooms[5:2:-1])
    assert below.readonly
    assert below == b"\5" * size + b"\4" * size + b"\3" * size
    assert neighbours(rooms[1:2]) == b"\1" * size


def test_bodies_that_are_to_lie_alone_do_and_share_memory_with_the_like() -> None:
    memory = BodyBufferPool(16 * MIB)
    room = memory.take(0, 100_000, several=False)
    other = memory.take(0, 100_000, several=False)
    assert room.is_last
    assert other.is_last
    place = address(room.view)
    del room
    assert address(memory.take(0, 110_000, several=False).view) == place


def test_a_body_that_lies_alone_does_not_part_those_that_lie_side_by_side() -> None:
    memory = BodyBufferPool(16 * MIB)
    earlier = memory.take(0, 100_000)
    memory.take(0, 100_000, several=False)
    assert earlier.is_above(memory.take(0, 100_000))


def test_what_was_let_go_is_used_again_and_what_is_held_is_not() -> None:
    memory = BodyBufferPool(16 * MIB)
    first = [memory.take(0, 2 * MIB) for _ in range(2)]
    assert address(first[0].view) != address(first[1].view)
    place = address(first[1].view)
    del first[1]
    assert address(memory.take(0, 2 * MIB - 7).view) - place in range(-ALIGNMENT, ALIGNMENT)


def test_a_slab_begins_anew_as_soon_as_nobody_looks() -> None:
    memory = BodyBufferPool(16 * MIB)
    place = address(memory.take(0, 100_000).view)
    assert address(memory.take(7, 100_000).view[7:]) == place
    held = memory.take(0, 100_000)
    assert address(memory.take(0, 100_000).view) == place - 100_000
    del held
    assert address(memory.take(0, 100_000).view) == place


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
    memory = BodyBufferPool(8 * MIB)
    view = memory.take(0, 100_000).view
    place = address(view)
    kept = keep(view)
    del view
    for _ in range(20):
        assert address(memory.take(0, 100_000).view) != place
    del kept
    assert address(memory.take(0, 100_000).view) == place


def test_kept_inputs_stay_as_they_were_while_others_come_and_go() -> None:
    """As requests do: some are looked at longer than others, and by another thread."""
    rng = random.Random(1)
    memory = BodyBufferPool(2 * MIB)
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
        room = memory.take(100, rng.choice([70_000, 80_000, 300_000]), several=rng.random() < 0.7).view
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
    memory = BodyBufferPool(4 * MIB)
    held = [memory.take(0, 200_000) for _ in range(50)]
    assert len({address(room.view) for room in held}) == 50
    assert memory.kept_bytes <= 4 * MIB
    assert sum(room.is_last for room in held) > 25  # beyond what is kept each lies alone
    del held
    large = memory.take(0, 3 * MIB)
    place = address(large.view)
    del large
    assert address(memory.take(0, 3 * MIB).view) == place
    assert memory.kept_bytes <= 4 * MIB
    assert len(memory.take(0, 9 * MIB).view) == 9 * MIB
    assert memory.kept_bytes <= 4 * MIB


def test_many_sizes_at_once_are_forgotten_and_not_heaped_up() -> None:
    memory = BodyBufferPool(32 * MIB)
    for size in range(70_000, 170_000, 1_000):
        room = memory.take(0, size)
        room.view[:] = bytes(size)
        del room
    assert memory.kept_bytes <= 8 * MIB
