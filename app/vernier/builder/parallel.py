"""Runs batches on every core: several at once, each with few threads, which wait for one another less.

On two cores, two runs of one thread each do a fifth more than one run of two threads, and what Python does
with the results of one batch goes on beside the next.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: More runs at once would take the memory of as many batches.
_MAX_AT_ONCE = 8
CORES = len(os.sched_getaffinity(0))
#: Runs at once, and threads of each.
AT_ONCE = min(CORES, _MAX_AT_ONCE)
THREADS = CORES // AT_ONCE


def in_order(
    run: Callable[[Item], Result], items: Iterable[Item], at_once: int = AT_ONCE
) -> Iterator[Result]:
    """`run(item)` for every item, in the order of items, `at_once` of them at a time.

    Items are drawn on the caller's thread as they are needed, so that no more than `at_once` + 1 items and
    results are held. The first error ends it; one of `items` comes after the results of those before.
    """
    drawn = iter(items)
    first = next(drawn, None)
    second = next(drawn, None)
    if first is None:
        return
    if second is None or at_once == 1:  # nothing to run beside it
        yield run(first)
        if second is not None:
            yield run(second)
        yield from map(run, drawn)
        return
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="vernier-build")
    waiting: deque[Future[Result]] = deque(pool.submit(run, item) for item in (first, second))
    failure: BaseException | None = None
    try:
        while True:
            if len(waiting) > at_once:
                yield waiting.popleft().result()
            try:
                waiting.append(pool.submit(run, next(drawn)))
            except StopIteration:
                break
            except BaseException as error:  # what was begun before is not lost
                failure = error
                break
        while waiting:
            yield waiting.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)


def rows_each(rows: int, samples: int) -> int:
    """`rows`, or fewer, so that there are batches for all cores."""
    return max(1, min(rows, -(-samples // AT_ONCE)))
