"""Results come in order, few are held, and errors end it after what was begun."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from vernier.builder.parallel import in_order, rows_each


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
def test_results_come_in_the_order_of_items(at_once: int, count: int) -> None:
    assert list(in_order(lambda i: i * i, range(count), at_once)) == [i * i for i in range(count)]


def test_items_are_run_beside_one_another() -> None:
    together = threading.Barrier(2, timeout=20)
    assert len(list(in_order(lambda _: together.wait(), range(6), 2))) == 6


def test_items_are_drawn_as_they_are_needed() -> None:
    drawn = []

    def items() -> Iterator[int]:
        for i in range(100):
            drawn.append(i)
            yield i

    for done, _ in enumerate(in_order(lambda i: i, items(), 3)):
        assert len(drawn) <= done + 5


def test_an_error_of_the_data_comes_after_what_was_begun() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(in_order(lambda i: i, items(), 2))
    assert seen == [0, 1, 2, 3, 4]


def test_an_error_of_a_run_ends_it() -> None:
    ran = []

    def run(i: int) -> int:
        ran.append(i)
        return 1 // (i - 3)

    with pytest.raises(ZeroDivisionError):
        list(in_order(run, range(1000), 2))
    assert len(ran) < 10


def test_a_consumer_may_stop_early() -> None:
    results = in_order(lambda i: i, range(1000), 2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]


def test_there_are_batches_for_every_core() -> None:
    assert rows_each(32, 10_000) == 32
    assert rows_each(32, 1) == 1
    assert 1 <= rows_each(32, 8) <= 8
