"""How long steps tell a person how far they are.

with progress.task("calibrating", total=512) as advance:
    for batch in batches:
        ...
        advance(len(batch))
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

Advance = Callable[[int], None]


class Progress(Protocol):
    """Receives the steps of a build."""

    def task(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Opens a step of `total` units (None: nobody knows); the value counts units that are done."""
        ...

    def note(self, text: str) -> None:
        """One line that stays on the screen."""
        ...


class NoProgress:
    """Says nothing: for tests, libraries and `--json`."""

    @contextlib.contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Advance]:
        def advance(units: int) -> None:
            return

        yield advance

    def note(self, text: str) -> None:
        return


def for_people() -> Progress:
    """Bars where standard error is a terminal, lines elsewhere."""
    console = Console(stderr=True, highlight=False)
    return BarProgress(console) if console.is_terminal else LineProgress(sys.stderr)


@dataclass
class _Step:
    title: str
    total: int | None
    began: float
    done: int = 0

    def line(self, now: float) -> str:
        seconds = now - self.began
        text = self.title
        if self.total:
            text += f": {self.done:,} of {self.total:,} ({self.done / self.total:.0%})"
        elif self.done:
            text += f": {self.done:,}"
        text += f", {seconds:.0f} s"
        if self.total and 0 < self.done < self.total:
            text += f", about {seconds * (self.total - self.done) / self.done:.0f} s left"
        return text


class LineProgress:
    """One line every some seconds about the step that runs, for logs.

    Args:
        every_s: seconds between two lines; a step that is over sooner has none.
    """

    def __init__(self, stream: TextIO, every_s: float = 10.0, clock: Callable[[], float] = monotonic) -> None:
        self._stream = stream
        self._every_s = every_s
        self._clock = clock
        self._steps: list[_Step] = []

    @contextlib.contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Advance]:
        step = _Step(title, total, self._clock())
        self._steps.append(step)
        over = threading.Event()
        outermost = len(self._steps) == 1
        if outermost:
            # A thread: a step may be silent for minutes, and the line is to say that it runs.
            writer = threading.Thread(target=self._write, args=(over,), name="progress", daemon=True)
            writer.start()

        def advance(units: int) -> None:
            step.done += units

        try:
            yield advance
        finally:
            self._steps.remove(step)
            if outermost:
                over.set()
                writer.join()

    def note(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _write(self, over: threading.Event) -> None:
        while not over.wait(self._every_s):
            for step in self._steps[-1:]:
                self.note(step.line(self._clock()))


class BarProgress:
    """Bars on a terminal; everything goes to standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bars: RichBars | None = None

    @contextlib.contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Advance]:
        outermost = self._bars is None
        if outermost:
            self._bars = RichBars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                disable=not self._console.is_terminal,
            )
            self._bars.start()
        bars = self._bars
        assert bars is not None
        task = bars.add_task(title, total=total)

        def advance(units: int) -> None:
            bars.advance(task, units)

        try:
            yield advance
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)
