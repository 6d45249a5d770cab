"""`build_engine.py` as people run it: a process of its own, real files, a real full disk, two at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.unit.builder.architectures import residual_cnn
from tests.unit.builder.models import mlp, save, weights
from vernier.builder.resume import check_path
from vernier.package.integrity import open_package

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "build_engine.py"), *map(str, arguments)]


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, timeout=110)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1.4 MB and data for it."""
    folder = tmp_path_factory.mktemp("build")
    save(mlp(width=40_000), folder / "wide.onnx")
    save(mlp(), folder / "m.onnx")
    np.savez(folder / "c.npz", x=weights(64, 8) * 3)
    return folder


@pytest.mark.parametrize(
    ("example", "name", "metric"), [("recommender", "ranker", "auc"), ("speech", "keywords", "accuracy")]
)
def test_the_examples_are_built_in_three_precisions(
    example: str, name: str, metric: str, tmp_path: Path
) -> None:
    source = EXAMPLES / example
    done = run(
        source / "model.onnx", "--name", name, "--precision", "fp32,fp16,int8",
        "--calibration", source / "calibration.npz", "--eval", source / "eval.npz",
        "--out", tmp_path / "engines", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    package = tmp_path / "engines" / name / "1"
    manifest = open_package(package)
    assert set(manifest.variants) == {"fp32", "fp16", "int8"}
    measured = {
        v["precision"]: next(value for key, value in v["metrics"].items() if key.split("@")[0] == metric)
        for v in outcome["variants"]
    }
    written = json.loads((source / "metrics.json").read_text())
    assert str(round(measured["fp32"], 2))[:4] in json.dumps(written)
    assert measured["fp16"] >= 0.99 * measured["fp32"]
    assert measured["int8"] >= 0.99 * measured["fp32"]
    sizes = {v["precision"]: v["bytes"] for v in outcome["variants"]}
    assert sizes["int8"] < sizes["fp16"] < sizes["fp32"]
    assert (package / "report.html").stat().st_size > 1000


def test_paths_are_relative_to_where_one_stands(folder: Path) -> None:
    done = run("m.onnx", "--name", "m", "--precision", "fp32", "--calibration", "c.npz", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime serves fp32" in done.stdout
    open_package(folder / "engines" / "m" / "1")


def test_two_builders_at_once_get_two_versions(folder: Path, tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            command(
                folder / "m.onnx", "--name", "m", "--eval", folder / "c.npz", "--out", tmp_path, "--json"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    ended = [process.communicate(timeout=110) for process in started]
    assert [p.returncode for p in started] == [0, 0, 0], [error for _, error in ended]
    assert sorted(json.loads(out)["version"] for out, _ in ended) == [1, 2, 3]
    for version in ("1", "2", "3"):
        open_package(tmp_path / "m" / version)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["1", "2", "3"]


def test_a_full_disk_is_said_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """On a file system of 700 kB of its own, in a mount namespace that ends with the process."""
    disk = tmp_path / "disk"
    disk.mkdir()
    build = " ".join(
        f"'{part}'" for part in command(folder / "wide.onnx", "--name", "m", "--out", disk / "engines")
    )
    script = f"mount -t tmpfs -o size=700k tmpfs '{disk}' && {build}; code=$?; find '{disk}' -mindepth 1; exit $code"
    namespace = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    )
    done = subprocess.run([*namespace, "sh", "-c", script], capture_output=True, text=True, timeout=110)
    assert "mount" not in done.stderr, f"this machine cannot mount a small disk: {done.stderr}"
    assert done.returncode == 2, done.stderr
    assert f"the disk of {disk / 'engines' / 'm'} is full; nothing was written" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(done.stdout.split()) <= {str(disk / "engines")}


def test_a_file_size_limit_is_said_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    limited = ["sh", "-c", 'ulimit -f 500; exec "$@"', "sh", *command(folder / "wide.onnx", "--name", "m")]
    done = subprocess.run(
        [*limited, "--out", str(tmp_path / "engines")], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write the package" in done.stderr
    assert not list((tmp_path / "engines").rglob("*"))


def test_an_interrupted_build_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    arguments = (
        folder / "wide.onnx",
        "--name",
        "m",
        "--eval",
        folder / "c.npz",
        "--out",
        tmp_path / "engines",
    )
    with subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a shell's `&` ignores it
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()  # "building fp16": FP32 lies in the temporary folder by now
        assert list((tmp_path / "engines" / "m").glob(".building-*"))
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "interrupted: nothing was published, and the temporary files in" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "engines").rglob("*"))


def test_what_a_killed_build_left_is_gone_after_the_next(folder: Path, tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    slow = (folder / "wide.onnx", "--name", "m", "--eval", folder / "c.npz", "--out", engines)
    with subprocess.Popen(command(*slow), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.kill()
    assert list(engines.glob("m/.building-*"))
    done = run(folder / "m.onnx", "--name", "other", "--out", engines)
    assert done.returncode == 0, done.stderr
    assert not list(engines.rglob(".building-*"))


def test_a_killed_calibration_goes_on_and_gives_the_same_package(tmp_path: Path) -> None:
    """SIGKILL in the middle: nothing can be tidied up, and only the state file tells what was done."""
    samples = 60_000
    save(residual_cnn(), tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((samples, 3, 8, 8), np.float32)
    np.savez(tmp_path / "c.npz", x=x)
    np.savez(tmp_path / "e.npz", x=x[:64])
    state = tmp_path / "state"

    def arguments(out: str, *more: object) -> list[object]:
        data = ("--calibration", tmp_path / "c.npz", "--eval", tmp_path / "e.npz")
        wanted = ("--precision", "fp32,fp16,int8", "--budget", "rel_spread.max<=0.9")
        return [tmp_path / "m.onnx", "--name", "m", *data, *wanted, "--out", tmp_path / out, *more]

    with subprocess.Popen(
        command(*arguments("killed", "--resume", state)), stderr=subprocess.DEVNULL
    ) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL, (
            "it ended before it was killed: give it more samples"
        )
    check_path(state)
    again = run(*arguments("killed", "--resume", state))
    assert again.returncode == 0, again.stderr
    said = re.search(rf"going on with an interrupted calibration: (\d+) of {samples} samples", again.stderr)
    assert said, again.stderr
    assert 0 < int(said[1]) < samples
    assert not state.exists()
    whole = run(*arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    assert "going on" not in whole.stderr
    built = [open_package(tmp_path / out / "m" / "1").files for out in ("killed", "whole")]
    same = [name for name in built[1] if not name.startswith("report.")]
    assert {"fp32.onnx", "fp16.onnx", "int8.onnx", "calibration.cache", "golden.npz"} <= set(same)
    assert {n: built[0][n].sha256 for n in same} == {n: built[1][n].sha256 for n in same}


def test_folders_that_cannot_be_written_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run(folder / "m.onnx", "--name", "m", "--out", tmp_path / "file")
    assert done.returncode == 2
    assert "cannot write to" in done.stderr or "cannot write the package" in done.stderr
    assert "Traceback" not in done.stderr
