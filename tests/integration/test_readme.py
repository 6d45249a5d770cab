"""The README's commands, as written, in a copy of the tree with an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import clone
from tests.support.server import ROOT, Server, free_port

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(README) if found == language]


def commands() -> list[str]:
    """Every command of the sh blocks; one goes on while a quote is open or a line ends with a backslash."""
    found: list[str] = []
    pending = ""
    for line in "".join(blocks("sh")).splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue
        if words:
            found.append(pending.strip())
        pending = ""
    return found


def test_every_link_leads_somewhere() -> None:
    missing = [target for target in LINK.findall(README) if not (ROOT / target).exists()]
    assert missing == []


@pytest.fixture(scope="module")
def fresh_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone would hold: tracked files, and new ones that git does not ignore."""
    return clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def served(fresh_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`make serve`, the README's first command."""
    assert "make serve" in commands()
    port = free_port()
    log_path = tmp_path_factory.mktemp("log") / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            ["make", "serve"],
            cwd=fresh_copy,
            env={**os.environ, "VERNIER_PORT": str(port)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, log_path)
    try:
        server.wait_until("/v2/health/ready", 200, timeout_s=240)
        yield server
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.mark.timeout(400)
def test_the_commands_run_and_the_answer_is_the_one_shown(served: Server, fresh_copy: Path) -> None:
    ran = []
    for command in commands():
        if command.startswith(("make", "git", "cd")):
            continue
        here = command.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}").replace(
            "python examples", f"{fresh_copy}/.venv-serve/bin/python examples"
        )
        if "frontend.py" in here:
            here += f" --url {served.url}"
        done = subprocess.run(here, shell=True, cwd=fresh_copy, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        ran.append(done.stdout)
    assert len(ran) >= 3
    answers = [json.loads(text) for text in ran if text.startswith("{")]
    shown = json.loads(blocks("json")[0])
    assert shown["outputs"].keys() == answers[0]["outputs"].keys()
    assert shown.keys() == answers[0].keys()
    (wanted,), (got,) = shown["outputs"]["score"], answers[0]["outputs"]["score"]
    assert abs(wanted[0] - got[0]) < 0.02
