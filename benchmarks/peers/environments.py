"""An environment for each peer under build/peers/, kept until its requirements change.

Where the wheels were carried (`benchmarks.peers.carry`), this Python is everyone's environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.carry import CARRIED
from benchmarks.peers.peers import Peer
from benchmarks.processes import ROOT

FOLDER = ROOT / "build" / "peers"
DEBIAN_PYTHON = "/usr/bin/python3"

_VERSIONS = """
import importlib.metadata as m, json, platform, sys
print(json.dumps({"python": platform.python_version(), **{n: m.version(n) for n in sys.argv[1:]}}))
"""


class InstallError(RuntimeError):
    """A peer cannot be installed; the message is the last line of what pip said."""


def python_of(peer: Peer) -> str:
    """The Python of a peer's environment; this one for what needs nothing of its own."""
    if CARRIED in os.environ or not peer.requirements:
        return sys.executable
    return str(FOLDER / peer.name / "bin" / "python")


def install(peer: Peer) -> None:
    """Makes the environment if it is not there as required. Raises InstallError."""
    if not peer.requirements:
        return
    if CARRIED in os.environ:
        try:
            importlib.metadata.version(peer.package)
        except importlib.metadata.PackageNotFoundError:
            raise InstallError(f"{peer.package} is not among the wheels that were carried") from None
        return
    folder = FOLDER / peer.name
    stamp = folder / "requirements.txt"
    base = str(Path(sys.executable).resolve())  # not this environment's link to it
    if peer.system_python:
        if not Path(DEBIAN_PYTHON).is_file():
            raise InstallError(f"needs {DEBIAN_PYTHON}, which its native part is linked with")
        base = DEBIAN_PYTHON
    wanted = "\n".join((base, *peer.requirements))
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    _run([base, "-m", "venv", str(folder)])
    _run(
        [
            python_of(peer),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *peer.requirements,
        ]
    )
    stamp.write_text(wanted)


def versions(peer: Peer) -> dict[str, str]:
    """Python, and the packages that matter, as they are installed."""
    if peer.name == "vernier":
        from vernier import __version__

        return {"vernier": __version__, **versions_of(sys.executable, "uvicorn", "httptools", "onnxruntime")}
    names = [peer.package, *(("onnxruntime",) if peer.requirements else ())]
    return versions_of(python_of(peer), *names)


def versions_of(python: str, *packages: str) -> dict[str, str]:
    said = subprocess.run(
        [python, "-c", _VERSIONS, *packages], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = json.loads(said)
    return found


def _run(command: list[str]) -> None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(str(error)) from error
    if ran.returncode != 0:
        lines = [line for line in (ran.stderr or ran.stdout).splitlines() if line.strip()]
        raise InstallError(lines[-1][:300] if lines else f"exit status {ran.returncode}")
