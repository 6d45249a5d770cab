"""How long steps tell a person how far they are.

with progress.task("calibrating", total=512) as advance:
    for batch in batches:
        ...
        advance(len(batch))
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

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


class BarProgress:
    """Bars on a terminal, one line a step elsewhere. Everything goes to standard error."""

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
