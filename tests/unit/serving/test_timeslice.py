"""Time slices by the real system calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.threads import NO_SLICES, Idler
from vernier.serving.timeslice import set_time_slice, time_slice

pytestmark = pytest.mark.skipif(NO_SLICES, reason="slices of one's own came with Linux 6.12")


@pytest.fixture
def idler() -> Iterator[Idler]:
    thread = Idler()
    yield thread
    thread.end()


def test_a_slice_is_a_threads_own(idler: Idler) -> None:
    mine = time_slice(threading.get_native_id())
    assert set_time_slice(idler.id, 0.0123)
    assert time_slice(idler.id) == pytest.approx(0.0123)
    assert time_slice(threading.get_native_id()) == mine


def test_zero_stands_for_the_kernels_default(idler: Idler) -> None:
    usual = time_slice(idler.id)
    set_time_slice(idler.id, 0.02)
    assert set_time_slice(idler.id, 0.0)
    assert time_slice(idler.id) == usual


def test_nothing_else_about_the_thread_changes(idler: Idler) -> None:
    os.setpriority(os.PRIO_PROCESS, idler.id, 5)
    os.sched_setscheduler(idler.id, os.SCHED_BATCH, os.sched_param(0))
    assert set_time_slice(idler.id, 0.01)
    assert os.getpriority(os.PRIO_PROCESS, idler.id) == 5
    assert idler.policy == os.SCHED_BATCH
    assert time_slice(idler.id) == pytest.approx(0.01)


def test_a_thread_that_has_ended_has_none() -> None:
    gone = Idler()
    gone.end()
    assert not set_time_slice(gone.id, 0.01)
    assert time_slice(gone.id) is None
