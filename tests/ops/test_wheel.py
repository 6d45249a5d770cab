"""What `pip install` of this repository brings: one package, one command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from vernier import __version__
from vernier.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Built from a copy, since setuptools leaves its own folders beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "build_engine.py"):
        shutil.copy(ROOT / name, source)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "app", source / "app", ignore=left_out)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ZipFile(next(out.glob("*.whl")))


def test_the_wheel_claims_no_name_but_its_own(wheel: ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"vernier", f"vernier-{__version__}.dist-info"}


def test_every_module_and_template_is_in_the_wheel(wheel: ZipFile) -> None:
    sources = {
        path.relative_to(ROOT / "app").as_posix()
        for path in (ROOT / "app" / "vernier").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources - set(wheel.namelist()) == set()


def test_the_command_vernier_serves(wheel: ZipFile) -> None:
    parser = ConfigParser()
    parser.read_string(wheel.read(f"vernier-{__version__}.dist-info/entry_points.txt").decode())
    assert dict(parser["console_scripts"]) == {"vernier": f"{main.__module__}:{main.__name__}"}
