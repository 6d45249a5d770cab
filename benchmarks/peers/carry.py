"""What the benchmark needs on a machine without a package index, in a folder that travels there.

    python -m benchmarks.peers.carry                                        # here, into .carry/
    python3 -m benchmarks.peers --cores 8 --wheels .carry/wheels …          # there

The folder holds `wheels/` for CPython 3.12 on x86-64 Linux, `wrk/` from Debian's packages with every library that it
needs and their loader, so that the other machine's libraries do not matter, and `before/`, the code that the scaling
benchmark compares with. NumPy, ONNX Runtime, ONNX and pip are not in it: the other machine's Python has them.

Collecting needs the development environment, apt-get and dpkg; the rest needs nothing but Python itself.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The variable that names the folder of installed wheels; set where this Python serves as everyone's environment.
CARRIED = "PEERS_CARRIED"
#: What Vernier is compared with: its last revision with one process.
BEFORE = "eeb3fcf"
#: Large, and on the other machine.
_THERE = {"numpy", "onnxruntime", "onnx"}
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
_LIMIT_BYTES = 60 * 2**20
_PIP_S, _COMMAND_S = 300.0, 120.0
_WRAPPER = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
exec "$here/lib/ld-linux-x86-64.so.2" --library-path "$here/lib" "$here/wrk-program" "$@"
"""


# --- here -----------------------------------------------------------------------------------------
def collect(folder: Path) -> None:
    """Fills `folder` anew. Raises RuntimeError when it becomes too large to travel."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _download_wheels(folder / "wheels")
    _download_wrk(folder / "wrk")
    export_before(folder / "before")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    if size > _LIMIT_BYTES:
        raise RuntimeError(f"{folder} holds {size} bytes; {_LIMIT_BYTES} can travel")


def export_before(folder: Path) -> Path:
    """Writes the code of BEFORE into `folder` if it is not there. Returns `folder`; raises CalledProcessError."""
    if not (folder / "app").is_dir():
        packed = _run(["git", "-C", str(ROOT), "archive", BEFORE, "app", "build_engine.py"])
        folder.mkdir(parents=True, exist_ok=True)
        with subprocess.Popen(["tar", "-x", "-C", str(folder)], stdin=subprocess.PIPE) as tar:
            tar.communicate(packed, timeout=_COMMAND_S)
        if tar.returncode != 0:
            raise RuntimeError(f"tar cannot unpack {BEFORE}")
    return folder


def pins(lock: str) -> list[str]:
    """The requirements of a lock file without hashes and markers: name==version."""
    return re.findall(r"^[\w.-]+==[^\s;\\]+", lock, re.MULTILINE)


def wanted(requirements: Iterable[str]) -> list[str]:
    """Without what the other machine has; each once."""
    kept = (text.split(";")[0].strip() for text in requirements)
    return sorted({text for text in kept if re.split(r"[\[<>=~! ]", text)[0].lower() not in _THERE})


def _download_wheels(folder: Path) -> None:
    from benchmarks.peers.peers import PEERS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["build"]]
    for peer in PEERS:
        if peer.name in ("mosec", "fastapi"):
            needs += peer.requirements
    folder.mkdir(parents=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins((ROOT / "requirements" / "build.txt").read_text())))
    platforms = [word for name in _PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    _run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"),
            *("--python-version", "3.12", "--implementation", "cp", *platforms),
            *("--dest", str(folder), "--constraint", str(constraints), *wanted(needs)),
        ],
        _PIP_S,
    )
    constraints.unlink()


def _download_wrk(folder: Path) -> None:
    work, library = folder / "work", folder / "lib"
    work.mkdir(parents=True)
    library.mkdir()
    _run(["apt-get", "download", "wrk", "libluajit-5.1-2"], folder=work)
    for package in sorted(work.glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(work / "root")])
    program = shutil.move(work / "root" / "usr" / "bin" / "wrk", folder / "wrk-program")
    own = ":".join(str(path) for path in (work / "root" / "usr" / "lib").glob("*-linux-gnu"))
    listed = _run(["ldd", str(program)], environment={"LD_LIBRARY_PATH": own}).decode()
    for path in re.findall(r"(/\S+) \(0x", listed):
        shutil.copy(path, library / Path(path).name)
    shutil.rmtree(work)
    wrapper = folder / "wrk"
    wrapper.write_text(_WRAPPER)
    wrapper.chmod(0o755)


# --- there ----------------------------------------------------------------------------------------
def restart(wheels: Path, arguments: Sequence[str]) -> None:
    """Installs `wheels` into a folder and runs `python -m benchmarks.peers` again with it. Does not return.

    The folder is made once for each set of wheels. wrk and the code to compare with are taken from beside the wheels
    where the environment names none.
    """
    site = install(wheels)
    environment = dict(os.environ)
    paths = [str(ROOT / "app"), str(site), environment.get("PYTHONPATH", "")]
    environment |= {CARRIED: str(site), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["PYTHONUSERBASE"] = str(site)  # MOSEC looks for its program in bin/ of every known scheme
    beside = wheels.parent / "wrk"
    if (beside / "wrk").is_file() and "WRK" not in environment:
        for name in ("wrk", "wrk-program", "lib/ld-linux-x86-64.so.2"):
            (beside / name).chmod(0o755)  # a copy may have lost it
        environment["WRK"] = str(beside / "wrk")
    if (wheels.parent / "before").is_dir():
        environment.setdefault("PEERS_BEFORE", str(wheels.parent / "before"))
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.peers", *arguments], environment)


def install(wheels: Path) -> Path:
    """Installs every wheel of a folder below build/carried/. Returns the folder for PYTHONPATH."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"{wheels} holds no wheels; fill it with python -m benchmarks.peers.carry")
    names = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    site = ROOT / "build" / "carried" / hashlib.sha256(names.encode()).hexdigest()[:12]
    if not (site / "complete").is_file():
        shutil.rmtree(site, ignore_errors=True)
        _run(
            [
                *(
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-index",
                    "--no-deps",
                    "--no-cache-dir",
                ),
                *("--disable-pip-version-check", "--find-links", str(wheels), "--target", str(site)),
                *map(str, files),
            ],
            _PIP_S,
        )
        (site / "complete").touch()
    return site


def _run(
    command: Sequence[str],
    timeout_s: float = _COMMAND_S,
    *,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> bytes:
    ran = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        check=True,
        timeout=timeout_s,
    )
    return ran.stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.carry", description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / ".carry", help="the folder; it is made anew")
    collect(parser.parse_args().to.resolve())


if __name__ == "__main__":
    main()
