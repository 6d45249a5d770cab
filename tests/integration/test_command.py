"""The command `vernier`, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.packages import write_package
from tests.support.server import ROOT, Server, serve
from vernier.cli import COMMANDS


def vernier(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERNIER_")}
    return subprocess.run(
        [sys.executable, "-m", "vernier.cli", *arguments],
        env={**inherited, "PYTHONPATH": str(ROOT / "app"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("command")
    write_package(folder / "engines", "mlp")
    with serve(folder / "engines", folder / "log") as server:
        yield server


def test_help_names_every_command_and_each_has_its_own() -> None:
    told = vernier("--help")
    assert told.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in told.stdout
        own = vernier(name, "--help")
        assert (own.returncode, "usage" in own.stdout.lower()) == (0, True), own.stderr


def test_an_unknown_command_is_told_what_there_is() -> None:
    told = vernier("serv")
    assert (told.returncode, told.stdout) == (2, "")
    assert "there is no command 'serv'; there are serve, build" in told.stderr


def test_a_package_is_inspected_by_the_builders_command(tmp_path: Path) -> None:
    package = write_package(tmp_path, "mlp")
    told = vernier("inspect", str(package), "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["name"] == "mlp"
    missing = vernier("inspect", str(tmp_path / "nothing"))
    assert missing.returncode == 2


def test_a_running_service_is_asked(server: Server, tmp_path: Path) -> None:
    listed = vernier("models", "--url", server.url)
    assert listed.stdout == "mlp\t1\tfp32\tonnxruntime\tready\n"
    given = vernier("predict", "mlp", '{"x": [[1, 0, 0, 0]]}', VERNIER_URL=server.url)
    answer = json.loads(given.stdout)
    assert answer["outputs"] == server.predict({"x": [[1, 0, 0, 0]]}).json()["outputs"]
    np.savez(tmp_path / "inputs.npz", x=np.array([[1, 0, 0, 0]], np.float32))
    (tmp_path / "inputs.json").write_text('{"x": [[1, 0, 0, 0]]}')
    for name in ("inputs.npz", "inputs.json"):
        told = vernier("predict", "mlp", f"@{tmp_path / name}", "--version", "1", "--url", server.url)
        assert json.loads(told.stdout)["outputs"] == answer["outputs"], told.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("predict", "nobody", '{"x": [[1, 0, 0, 0]]}'), "404: there is no model 'nobody' here"),
        (("predict", "mlp", "{"), "the inputs cannot be read"),
        (("predict", "mlp", "@/nowhere/x.npz"), "the inputs cannot be read"),
        (("models", "--url", "http://127.0.0.1:1"), "http://127.0.0.1:1 does not answer"),
        (("models", "--url", "file:///etc/passwd"), "--url must begin with http:// or https://"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    server: Server, arguments: tuple[str, ...], sentence: str
) -> None:
    told = vernier(*arguments, VERNIER_URL=server.url)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith(f"vernier: {sentence}")
    assert told.stderr.count("\n") == 1
