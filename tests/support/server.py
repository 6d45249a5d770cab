"""A real server process for tests."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
#: Where the service is started: here, or in the copy that scripts.backport made for this Python.
APP = Path(os.environ.get("VERNIER_TEST_APP", ROOT))
_LINE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running service. `log` is what it wrote so far."""

    def __init__(
        self, process: subprocess.Popen[bytes], port: int, log_path: Path, health_port: int | None = None
    ) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._health_url = f"http://127.0.0.1:{health_port or port}"
        self._log_path = log_path

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def get(self, path: str) -> httpx.Response:
        """From the port where health and metrics answer."""
        return httpx.get(self._health_url + path, timeout=10)

    def predict(self, inputs: dict[str, Any], **fields: Any) -> httpx.Response:
        return httpx.post(self.url + "/v1/predict", json={"inputs": inputs, **fields}, timeout=30)

    def metrics(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Every sample of /metrics: name → [(labels, value)]."""
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for line in self.get("/metrics").text.splitlines():
            found = _LINE.match(line)
            if found and not line.startswith("#"):
                labels = dict(_LABEL.findall(found[2] or ""))
                samples.setdefault(found[1], []).append((labels, float(found[3])))
        return samples

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of `name` that carry `labels`; 0 when there is none."""
        wanted = labels.items()
        return sum(value for found, value in self.metrics().get(name, []) if wanted <= found.items())

    def wait_until(self, path: str, status: int, timeout_s: float = 30) -> httpx.Response:
        limit = time.monotonic() + timeout_s
        while True:
            try:
                response = self.get(path)
                if response.status_code == status:
                    return response
            except httpx.TransportError:
                response = None
            if self.process.poll() is not None or time.monotonic() > limit:
                seen = response.text if response is not None else "no answer"
                raise AssertionError(f"{path} did not become {status}: {seen}\n{self.log}")
            time.sleep(0.02)

    @property
    def processes(self) -> set[int]:
        """Ids of the service's processes: of one, or of supervisor, engine process and fronts."""
        return {self.process.pid, *descendants(self.process.pid)}

    @property
    def memory_bytes(self) -> int:
        """Of all its processes; what they share is counted once."""
        rolled = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.processes]
        return sum(int(text.split("\nPss:")[1].split()[0]) * 1024 for text in rolled)

    @property
    def open_files(self) -> int:
        """File descriptors of all its processes."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.processes)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 30) -> int:
        return self.process.wait(timeout_s)


def descendants(pid: int) -> set[int]:
    """Processes that it has started, and those that these have started."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        own = {int(child) for task in tasks for child in (task / "children").read_text().split()}
    except OSError:  # it has ended
        return set()
    return own.union(*map(descendants, own))


def administrator(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The setting that lets an administrator in, whose token is written into `folder`, and their headers."""
    token = folder / "token"
    token.write_text("administrators-token")
    return {"admin_token_file": str(token)}, {"authorization": "Bearer administrators-token"}


@contextmanager
def serve(
    engines: Path,
    log_path: Path,
    *,
    ready: bool = True,
    uvicorn: bool = False,
    module: str = "vernier",
    health_port: int | None = None,
    prefix: Sequence[str] = (),
    **environment: str,
) -> Iterator[Server]:
    """Runs the service over `engines` until the block ends.

    Args:
        ready: wait until readiness is green; else only until the process answers.
        uvicorn: start it as `uvicorn vernier.main:app` instead of `python -m vernier`.
        module: what `python -m` runs, a wrapper of the service for example.
        health_port: where health and metrics answer, when not on the service's port.
        prefix: a command that ends by becoming the one it is given, such as `env`.
        environment: VERNIER_… variables without their prefix, in lower case.
    """
    port = free_port()
    own = [sys.executable, "-m", module]
    plain = [sys.executable, "-m", "uvicorn", "vernier.main:app", "--host", "127.0.0.1", "--port", str(port)]
    settings = {f"VERNIER_{name.upper()}": value for name, value in environment.items()}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERNIER_")}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*prefix, *(plain if uvicorn else own)],
            cwd=APP,
            env={
                **inherited,
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(APP / "app"), os.environ.get("PYTHONPATH"), str(ROOT)])
                ),
                "VERNIER_HOST": "127.0.0.1",
                "VERNIER_PORT": str(port),
                "VERNIER_ENGINES_DIR": str(engines),
                # packages come and go when a test says so
                "VERNIER_WATCH_S": "0",
                # what a wrapper changes, it changes in its own process
                "VERNIER_FRONTS": os.environ.get("VERNIER_TEST_FRONTS", "1") if module == "vernier" else "0",
                **settings,
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, log_path, health_port)
    try:
        server.wait_until("/v2/health/live", 200)
        if ready:
            server.wait_until("/v2/health/ready", 200)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
