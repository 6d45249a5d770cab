"""Publication is atomic, and nothing that was changed afterwards is opened."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.packages import write_package
from vernier.errors import BuildError, PackageError
from vernier.package.integrity import (
    list_versions,
    open_package,
    publish,
    resolve_inside,
    staging_folder,
    temporary_folder,
)


def test_a_published_package_opens(tmp_path: Path) -> None:
    assert open_package(write_package(tmp_path)).name == "mlp"


def test_a_package_in_another_place_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    package = write_package(tmp_path, "mlp", 1)
    moved = package.rename(package.parent / "2")
    with pytest.raises(PackageError, match="mlp/1"):
        open_package(moved)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "a\\b"])
def test_names_that_leave_the_package_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError):
        resolve_inside(tmp_path, path)


def test_versions_are_published_once_and_half_written_ones_are_never_seen(tmp_path: Path) -> None:
    with staging_folder(tmp_path) as staged:
        (staged / "file").write_text("x")
        assert list_versions(tmp_path) == []
        publish(staged, tmp_path, 1)
    assert list_versions(tmp_path) == [1]
    with staging_folder(tmp_path) as staged:
        (staged / "file").write_text("y")
        with pytest.raises(FileExistsError):
            publish(staged, tmp_path, 1)
        publish(staged, tmp_path, 2)
    assert list_versions(tmp_path) == [1, 2]
    assert (tmp_path / "1" / "file").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with staging_folder(tmp_path) as staged:
            (staged / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill() -> None:
        with staging_folder(tmp_path), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(BuildError, match="full") as caught:
        fill()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="--out"), staging_folder(tmp_path / "file"):
        pass


def test_links_are_not_followed_out_of_a_package(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    package = tmp_path / "package"
    package.mkdir()
    os.symlink(outside, package / "link")
    with pytest.raises(PackageError, match="link"):
        resolve_inside(package, "link")


def test_what_a_killed_build_left_is_removed_by_the_next_and_a_build_under_way_is_not(tmp_path: Path) -> None:
    hold = (
        "import fcntl, os, sys\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print(flush=True)\n"
        "sys.stdin.read()"
    )
    killed, running, young = (tmp_path / f".building-{name}" for name in ("killed", "running", "young"))
    for folder in (killed, running, young):
        folder.mkdir()
        (folder / "fp32.onnx").write_bytes(b"half")
    for folder in (killed, running):
        os.utime(folder, (0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(running)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        with staging_folder(tmp_path) as staged:
            assert sorted(tmp_path.iterdir()) == sorted([running, young, staged])
        builder.kill()
    with staging_folder(tmp_path):
        assert not running.exists()


def test_a_build_that_was_just_killed_leaves_nothing_to_the_next_of_any_model(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib\n"
        "from vernier.package.integrity import staging_folder, temporary_folder\n"
        "with staging_folder(pathlib.Path(sys.argv[1])) as s, temporary_folder(pathlib.Path(sys.argv[2]), 'w-') as t:\n"
        "    (s / 'half').write_bytes(b'x'); (t / 'half').write_bytes(b'x')\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()"
    )
    work = tmp_path / "work"

    def begin(model: str) -> subprocess.Popen[bytes]:
        builder = subprocess.Popen(
            [sys.executable, "-c", hold, str(tmp_path / "engines" / model), str(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert builder.stdout is not None
        builder.stdout.readline()
        return builder

    with begin("a") as killed, begin("b") as other_killed, begin("a") as running:
        killed.kill()
        other_killed.kill()
        killed.wait()
        other_killed.wait()
        assert len(list(tmp_path.rglob("half"))) == 6
        with staging_folder(tmp_path / "engines" / "c"), temporary_folder(work, "w-"):
            left = {path.parent.name.split("-")[-2] for path in tmp_path.rglob("half")}
            assert left == {str(running.pid)}
        running.kill()
