"""Who is measured, and how each is told to use several cores."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.peers import carry
from benchmarks.peers.environments import InstallError, install, python_of, versions, versions_of
from benchmarks.peers.peers import PEERS, VERNIER, Peer, Place
from benchmarks.peers.rounds import ONE_THREAD, build_package
from benchmarks.peers.workloads import Workload
from benchmarks.processes import ROOT, ServerProcess, free_port

FOLDER = ROOT / "build" / "scaling"
#: How many workers MOSEC is tried with.
MOSEC_WORKERS = (1, 2, 4, 8)
#: Stands for a service that finds out itself how many processes it wants.
BY_ITSELF = 0


@dataclass(frozen=True)
class Contestant:
    """
    Attributes:
        peer: how it is started and spoken to.
        root: the folder that it is started in.
        processes: from a number of cores to the numbers of processes that it is tried with; the best one counts.
        variable: the environment variable that takes this number.
        engines: the folder of its own engine packages; None for who takes the model as it is.
    """

    peer: Peer
    root: Path
    processes: Callable[[int], Sequence[int]]
    variable: str
    engines: Path | None = None

    @property
    def name(self) -> str:
        return self.peer.name

    def prepare(self, workloads: Sequence[Workload]) -> None:
        """Installs it, and builds its packages. Raises InstallError."""
        install(self.peer)
        if self.engines is not None:
            self.engines.mkdir(parents=True, exist_ok=True)
            for load in workloads:
                try:
                    build_package(load, self.root, self.engines)
                except (SystemExit, subprocess.TimeoutExpired) as error:
                    raise InstallError(str(error)[-300:]) from error

    def start(self, load: Workload, cores: Sequence[int], processes: int) -> ServerProcess:
        place = Place(python_of(self.peer), free_port(), free_port(), load, self.engines or FOLDER)
        environment = {**ONE_THREAD, **self.peer.environment(place)}
        if processes != BY_ITSELF:
            environment[self.variable] = str(processes)
        log = FOLDER / "logs" / f"{self.name}-{len(cores)}-{load.name}.log"
        return ServerProcess(
            self.peer.command(place), place.port, log, core=cores, folder=self.root, environment=environment
        )

    def versions(self) -> dict[str, str]:
        if self.engines is None:
            return versions(self.peer)
        code = carry.BEFORE if self.root != ROOT else fingerprint()
        return {"code": code, **versions_of(sys.executable, "uvicorn", "httptools", "onnxruntime")}


def fingerprint() -> str:
    """A short name of this checkout's serving code that changes with it; git may be missing."""
    whole = hashlib.sha256()
    for file in sorted((ROOT / "app" / "vernier").rglob("*.py")):
        whole.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()[:7]


def contestants(fronts: Sequence[int] = ()) -> list[Contestant]:
    """Vernier first.

    Args:
        fronts: numbers of front processes that Vernier is tried with; none leaves it to the service.
    Raises:
        ValueError: when the service knows no such setting.
    """
    if fronts and not has_fronts():
        raise ValueError("this checkout's service has no setting `fronts`")
    peers = {peer.name: peer for peer in PEERS}
    before = replace(
        VERNIER,
        name="vernier-before",
        title="Vernier before",
        command=lambda place: [sys.executable, "-m", "app"],
        environment=_on_cpu,
    )
    return [
        Contestant(
            replace(VERNIER, environment=_on_cpu),
            ROOT,
            lambda cores: [count for count in fronts if count <= cores] or (BY_ITSELF,),
            "VERNIER_FRONTS",
            FOLDER / f"engines-{fingerprint()}",
        ),
        Contestant(before, before_folder(), lambda cores: (BY_ITSELF,), "", FOLDER / "engines-before"),
        Contestant(
            peers["mosec"],
            ROOT,
            lambda cores: [count for count in MOSEC_WORKERS if count <= cores],
            "PEER_WORKERS",
        ),
        Contestant(peers["fastapi"], ROOT, lambda cores: (cores,), "PEER_WORKERS"),
    ]


def has_fronts() -> bool:
    """Whether this checkout's service can be told how many front processes to start."""
    from vernier.settings import Settings

    return "fronts" in Settings.model_fields


def before_folder() -> Path:
    """The code to compare with: where PEERS_BEFORE names it, else out of git. A folder without it if neither works."""
    if "PEERS_BEFORE" in os.environ:
        return Path(os.environ["PEERS_BEFORE"])
    folder = FOLDER / f"before-{carry.BEFORE}"
    try:
        return carry.export_before(folder)
    except (OSError, RuntimeError, subprocess.SubprocessError):
        folder.mkdir(parents=True, exist_ok=True)  # building its package will say what is missing
        return folder


def _on_cpu(place: Place) -> dict[str, str]:
    """All servers compute on the same cores, also where there is a GPU."""
    return {**VERNIER.environment(place), "VERNIER_RUNTIME": "onnxruntime"}
