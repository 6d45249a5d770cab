"""Real containers for tests: docker and compose as commands, and a copy of the project as a clone has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.server import ROOT

#: Enough for a step of two cores that builds, loads or drains; a test that needs longer has failed.
STEP_S = 240


def clone(folder: Path) -> Path:
    """What a clone would hold: tracked files, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(
    *words: str, cwd: Path | None = None, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command with its output; fails the test with that when `check` and the exit code is not 0."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STEP_S,
    )
    assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-6000:]}"
    return done


def docker(*words: str, check: bool = True) -> str:
    return run("docker", *words, check=check).stdout.strip()


def inspect(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", container))[0]
    return found


def until(condition: Callable[[], Any], timeout_s: float = 60, why: Callable[[], str] = str) -> float:
    """Waits for `condition` and returns the seconds that it took.

    Args:
        why: what is shown when it does not come true.
    """
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, why()[-6000:]
        time.sleep(0.2)
    return time.monotonic() - started


class Stack:
    """A compose project of its own name, with its ports where nobody else has theirs."""

    def __init__(self, folder: Path, name: str, *files: str, **environment: str) -> None:
        (folder / "ports.yml").write_text(
            "services:\n"
            '  prometheus: {ports: !override ["127.0.0.1::9090"]}\n'
            '  alertmanager: {ports: !override ["127.0.0.1::9093"]}\n'
            '  grafana: {ports: !override ["127.0.0.1::3000"]}\n'
        )
        self.folder = folder
        self._words = ["docker", "compose", "--ansi", "never", "--project-name", name]
        for file in ("docker-compose.yml", *files, "ports.yml"):
            self._words += ["--file", file]
        self._environment = {"PUBLISH": "127.0.0.1:", "PUBLISH_GRPC": "127.0.0.1:", **environment}

    def compose(self, *words: str, check: bool = True) -> str:
        done = run(*self._words, *words, cwd=self.folder, check=check, **self._environment)
        return done.stdout

    def url(self, service: str, port: int) -> str:
        return f"http://{self.compose('port', service, str(port)).strip().splitlines()[-1]}"

    def container(self, service: str) -> str:
        """Its id, also when it has ended."""
        return self.compose("ps", "--all", "--quiet", service).split()[-1]

    def logs(self, service: str) -> str:
        return self.compose("logs", "--no-color", "--no-log-prefix", service)

    def down(self, *words: str) -> None:
        self.compose("--profile", "*", "down", "--remove-orphans", "--timeout", "45", *words)
