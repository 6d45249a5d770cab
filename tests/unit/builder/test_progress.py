"""Without a terminal a line every some seconds says how far a step is."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest

from vernier.builder.progress import LineProgress, for_people


class Stream(io.StringIO):
    """Tells when a line was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def flush(self) -> None:
        self.written.set()


def test_a_long_step_says_how_far_it_is_and_how_long_it_will_take() -> None:
    stream, now = Stream(), [100.0]
    progress = LineProgress(stream, every_s=0.01, clock=lambda: now[0])
    with progress.task("calibrating", 512) as advance:
        advance(128)
        now[0] = 112.0
        stream.written.clear()
        assert stream.written.wait(10)
        with progress.task("searching") as inner:
            inner(3)
            now[0] = 115.0
            stream.written.clear()
            assert stream.written.wait(10)
            stream.written.clear()
            assert stream.written.wait(10)
    text = stream.getvalue()
    assert "calibrating: 128 of 512 (25%), 12 s, about 36 s left\n" in text
    assert "searching: 3, 3 s\n" in text
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_a_short_step_says_nothing_and_notes_are_kept() -> None:
    stream = Stream()
    progress = LineProgress(stream, every_s=60)
    with progress.task("short", 3):
        progress.note("building int8")
    assert stream.getvalue() == "building int8\n"


def test_lines_go_where_no_terminal_is(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert isinstance(for_people(), LineProgress)
