"""What `python -m vernier` and `make` do with nothing but the documented variables."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.support.packages import write_package
from tests.support.server import ROOT, Server, descendants, free_port, serve


def listening(server: Server) -> str:
    """The address that the service says it listens on."""
    return next(r["host"] for r in map(json.loads, server.log.splitlines()) if r["message"] == "listening")


#: Unsets what the tests' own server sets.
WITHOUT_HOST = ("env", "-u", "VERNIER_HOST")


def test_without_keys_it_serves_this_machine_only_and_says_so(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    with serve(engines, tmp_path / "log", prefix=WITHOUT_HOST) as server:
        assert listening(server) == "127.0.0.1"
        assert server.log.count("only this machine is served") == 1
        assert server.predict({"x": [[1, 2, 3, 4]]}).status_code == 200


def test_with_keys_it_serves_every_address(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    keys = tmp_path / "keys"
    keys.write_text(f'[[key]]\nname = "a"\nsha256 = "{"0" * 64}"\n')
    with serve(engines, tmp_path / "log", prefix=WITHOUT_HOST, api_keys_file=str(keys)) as server:
        assert listening(server) == "0.0.0.0"
        assert "only this machine" not in server.log
        assert server.predict({"x": [[1, 2, 3, 4]]}).status_code == 401


@pytest.mark.parametrize("fronts", ["0", "1"])
def test_it_takes_as_many_descriptors_as_the_hard_limit_grants(
    fronts: str, engines: Path, tmp_path: Path
) -> None:
    write_package(engines)
    prefix = ("bash", "-c", 'ulimit -n 5000 && ulimit -Sn 256 && exec "$@"', "bash")
    with serve(engines, tmp_path / "log", prefix=prefix, fronts=fronts) as server:
        for pid in {server.process.pid, *descendants(server.process.pid)}:
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert limits.split("Max open files")[1].split()[:2] == ["5000", "5000"]


def test_onnx_runtime_collects_nothing_for_its_maker(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    home = tmp_path / "home"
    home.mkdir()
    prefix = ("env", "-u", "ORT_DISABLE_TELEMETRY", "-u", "XDG_CACHE_HOME", f"HOME={home}")
    with serve(engines, tmp_path / "log", prefix=prefix) as server:
        assert server.predict({"x": [[1, 2, 3, 4]]}).status_code == 200
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_the_documentation_needs_nothing_from_elsewhere(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    with serve(engines, tmp_path / "log") as server:
        page = httpx.get(server.url + "/docs")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "http" + "s://" not in page.text
        for path in httpx.get(server.url + "/openapi.json").json()["paths"]:
            assert f"<code>{path}</code>" in page.text
        assert all("color_message" not in json.loads(line) for line in server.log.splitlines())


def made(target: str, *words: str, **environment: str) -> str:
    """The commands that make would run."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("VERNIER_", "MAKE"))
    }
    done = subprocess.run(
        ["make", "-n", target, *words],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_make_leaves_the_port_to_the_environment_unless_it_is_told_one() -> None:
    port = str(free_port())
    assert "VERNIER_PORT" not in made("serve", VERNIER_PORT=port)
    assert f"VERNIER_PORT={port} " in made("serve", f"PORT={port}", VERNIER_PORT="1")


def test_make_builds_the_examples_where_the_service_looks_for_them() -> None:
    commands = made("serve", VERNIER_ENGINES_DIR="/somewhere")
    assert "ranker --out /somewhere" in commands
    assert "VERNIER_ENGINES_DIR=/somewhere " in commands
