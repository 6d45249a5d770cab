"""Peak memory of a build that calibrates a ResNet-50-sized model on many samples, which lie in one mapped .npy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.precision import resnet50

ROOT = Path(__file__).resolve().parents[2]
_CHUNK = 100


@dataclass(frozen=True)
class Peak:
    """The largest resident set that a build had at any time, and how long it took."""

    samples: int
    seconds: float
    peak_bytes: int

    @property
    def sentence(self) -> str:
        return f"{self.samples} calibration samples: {self.seconds:.0f} s, {self.peak_bytes / 1e9:.2f} GB at most"


def measure_memory(samples: int) -> Peak:
    """Builds fp32 and int8 with `samples` pictures for calibration, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="vernier-memory-") as scratch:
        folder = Path(scratch)
        (folder / "model.onnx").write_bytes(resnet50.make_model(0).SerializeToString())
        np.savez(folder / "eval.npz", image=resnet50.pictures(16, 1))
        write_pictures(folder / "pictures.npy", samples)
        command = [
            sys.executable, str(ROOT / "build_engine.py"), str(folder / "model.onnx"), "--name", "resnet50",
            "--precision", "fp32,int8", "--no-search", "--calibration", str(folder / "pictures.npy"),
            "--eval", str(folder / "eval.npz"), "--out", str(folder / "engines"),
        ]  # fmt: skip
        began = perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - began
        if (code := os.waitstatus_to_exitcode(status)) not in (0, 1):  # 1: the gate refused INT8
            raise RuntimeError(f"the build ended with {code}")
        return Peak(samples, seconds, usage.ru_maxrss * 1024)


def write_pictures(path: Path, samples: int) -> None:
    """A .npy of pictures, drawn and written some at a time.

    It is not mapped: what is resident here would count as the build's, since Linux hands the largest resident
    set of the process that starts another on to it.
    """
    shape = (samples, 3, resnet50.PIXELS, resnet50.PIXELS)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, samples, _CHUNK):
            file.write(resnet50.pictures(min(_CHUNK, samples - start), 2 + start).tobytes())


def remember(peak: Peak, path: Path) -> None:
    """Adds the measurement to those in the file, in place of an older one with as many samples."""
    others = [other for other in recall(path) if other.samples != peak.samples]
    found = sorted([*others, peak], key=lambda entry: entry.samples)
    path.write_text(_as_json(found), "utf-8")


def recall(path: Path) -> list[Peak]:
    """The measurements in the file, the fewest samples first."""
    return [Peak(**entry) for entry in json.loads(path.read_text("utf-8"))] if path.exists() else []


def _as_json(peaks: Iterable[Peak]) -> str:
    return json.dumps([asdict(peak) for peak in peaks], indent=1) + "\n"
