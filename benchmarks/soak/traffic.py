"""Requests at a steady rate, reloads beside them, and what the service's process holds meanwhile."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.load import OpenLoop, Record, measure
from benchmarks.machine import stolen_seconds

#: The whole time is looked at in so many blocks of equal length, a minute each when it lasts twenty.
BLOCKS = 20
_SAMPLE_S = 0.5


@dataclass
class Held:
    """What the process held in one block: bytes and counts, a sample each half second.

    late_s: by how much the sampler itself woke too late: of seconds, when the whole machine stood still.
    stolen_s: what a hypervisor gave of the cores' time to other machines since the last sample.
    """

    rss: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    stolen_s: list[float] = field(default_factory=list)
    reloads: int = 0

    def row(self, record: Record) -> dict[str, float]:
        """Latencies in milliseconds, memory in MB; descriptors and threads as they are between two reloads."""
        summary = record.summary()
        return {
            "requests": summary.requests,
            "p50_ms": summary.p50_ms or 0.0,
            "p99_ms": summary.p99_ms or 0.0,
            "p999_ms": summary.p999_ms or 0.0,
            "rss_mb": statistics.fmean(self.rss) / 1e6,
            "descriptors": min(self.descriptors),
            "threads": min(self.threads),
            "reloads": self.reloads,
            "late_s": max(self.late_s),
            "stolen_s": sum(self.stolen_s),
        }


@dataclass
class Soak:
    """Drives one service.

    Args:
        pid: of the service. token: for administration. model: loaded anew every `reload_every_s`, in place of itself.

    Attributes:
        failed_reloads: what the service said to each.
    """

    pid: int
    token: str
    model: str
    reload_every_s: float
    failed_reloads: list[str] = field(default_factory=list)

    def run(self, plan: OpenLoop, core: int | None) -> tuple[Record, list[dict[str, float]]]:
        """The whole record, and a row for each block. Load and samples start within a second of each other."""
        held = [Held() for _ in range(BLOCKS)]
        stop = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            began = time.monotonic()

            def now() -> Held:
                return held[min(int((time.monotonic() - began) / plan.seconds * BLOCKS), BLOCKS - 1)]

            beside = [
                pool.submit(self._watch, began, plan.seconds, now),
                pool.submit(self._reload, plan.port, stop, began + plan.seconds, now),
            ]
            try:
                record = measure(plan, core)
            finally:
                stop.set()
            for task in beside:
                task.result()
        length = plan.seconds / BLOCKS
        return record, [h.row(record.between(i * length, (i + 1) * length)) for i, h in enumerate(held)]

    def _watch(self, began: float, seconds: float, now: Callable[[], Held]) -> None:
        folder = Path(f"/proc/{self.pid}")
        stolen = stolen_seconds()
        while (woken := time.monotonic()) < began + seconds:
            block = now()
            status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
            block.rss.append(1024 * int(status["VmRSS"].split()[0]))
            block.threads.append(int(status["Threads"]))
            block.descriptors.append(sum(1 for _ in (folder / "fd").iterdir()))
            before, stolen = stolen, stolen_seconds()
            block.stolen_s.append(stolen - before)
            time.sleep(_SAMPLE_S)
            block.late_s.append(time.monotonic() - woken - _SAMPLE_S)

    def _reload(self, port: int, stop: threading.Event, ends: float, now: Callable[[], Held]) -> None:
        url = f"http://127.0.0.1:{port}/v2/repository/models/{self.model}/load"
        while not stop.wait(self.reload_every_s) and time.monotonic() < ends:
            answer = httpx.post(url, headers={"authorization": f"Bearer {self.token}"}, timeout=120)
            if answer.status_code != 200:
                self.failed_reloads.append(answer.text)
            now().reloads += 1
