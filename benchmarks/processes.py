"""Servers under load: started on some cores, waited for, held still while another one is measured, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.load import Call, ClosedLoop, Record, measure
from benchmarks.load.run import pin

ROOT = Path(__file__).resolve().parents[1]


class StartError(RuntimeError):
    """A server did not come up, or does not answer as it should; the message says what it said last."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A server and whatever processes it starts. A context manager that ends them all.

    Args:
        command: what to run, from the repository's root.
        port: where it will listen.
        core: the only core it may use, or those; None for any.
        folder: where it is started; None for the repository's root.
        environment: on top of this process's own, without its VERNIER_ settings.
        log: the file for what it says.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        *,
        core: int | Collection[int] | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port
        self._log = log
        self._pids: set[int] = set()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERNIER_")}
        path = os.pathsep.join(filter(None, [str(ROOT / "app"), os.environ.get("PYTHONPATH")]))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=folder or ROOT,
                env={**inherited, "PYTHONPATH": path, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: pin(core),
            )

    def wait_ready(
        self,
        calls: Sequence[Call],
        timeout_s: float = 90.0,
        ask: Callable[[ClosedLoop], Record] = measure,
    ) -> None:
        """Returns when `calls` get answers with 200, right ones where they have a check.

        Args:
            calls: sent until then.
            timeout_s: how long it may take.
            ask: runs the load; by default in a new process each time.
        Raises:
            StartError: when the server ended, or does not answer rightly in time.
        """
        limit = time.monotonic() + timeout_s
        plan = ClosedLoop(
            port=self.port, calls=calls, seconds=0.2, connections=min(4, len(calls)), grace_s=5.0
        )
        seen = "it does not listen"
        while True:
            if self.process.poll() is not None:
                raise StartError(f"it ended with {self.process.returncode}: {self.last_words()}")
            if self._listens():
                try:
                    summary = ask(plan).summary()
                    if set(summary.statuses) == {200} and not summary.wrong and not summary.errors:
                        return
                    seen = f"answers {summary.statuses}, {summary.wrong} wrong of {summary.checked}, {summary.errors}"
                except ConnectionError as error:
                    seen = str(error)
            if time.monotonic() > limit:
                raise StartError(f"not ready after {timeout_s:g} s: {seen}; {self.last_words()}")
            time.sleep(0.2)

    def last_words(self) -> str:
        """The last line of its log that says something."""
        lines = self._log.read_text(errors="replace").splitlines()
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")

    def pause(self) -> None:
        """Stops every process of the server, so that what it does when idle costs the others nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self, patience_s: float = 15.0) -> None:
        """Ends it, and kills what is left of it after `patience_s`."""
        self.resume()
        self._tree()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._signal(signal.SIGKILL, self._pids - {self.process.pid})
        with suppress(ProcessLookupError):  # a process that was started in place of one that ended
            os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _signal(self, number: signal.Signals, pids: set[int] | None = None) -> None:
        for pid in self._tree() if pids is None else pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                self._pids.discard(pid)

    def _tree(self) -> set[int]:
        """The server's process, and those that came from it, now or earlier, and still are its session's or below."""
        found, todo = set[int](), [self.process.pid]
        while todo:
            pid = todo.pop()
            found.add(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    todo += map(int, children.read_text().split())
                except OSError:
                    continue  # ended meanwhile
        self._pids |= found
        return found
