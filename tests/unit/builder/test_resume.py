"""The file of `--resume`: what was written comes back, and a file of another kind is never lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vernier.builder.resume import HEADER_BYTES, CalibrationState, check_path
from vernier.errors import ResumeError
from vernier.tensors import Arrays

COUNTED = {"done": np.array(7), "0.counts": np.arange(5)}


def state(path: Path, subject: str = "a model and its data") -> CalibrationState:
    return CalibrationState(path, subject)


def same(found: Arrays | None) -> bool:
    return found is not None and all(np.array_equal(found[name], COUNTED[name]) for name in COUNTED)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below `folder`, links not followed."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_what_was_written_is_read_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    assert state(path).read() is None
    state(path).write({"done": np.array(1)})
    state(path).write(COUNTED)
    check_path(path)
    assert same(state(path).read())
    assert list(tmp_path.iterdir()) == [path]
    state(path).remove()
    state(path).remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [HEADER_BYTES, HEADER_BYTES + 10, -1])
def test_a_damaged_state_is_not_used_and_is_replaced(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "state"
    state(path).write(COUNTED)
    path.write_bytes(path.read_bytes()[:kept])
    assert state(path).read() is None
    state(path).write(COUNTED)
    assert same(state(path).read())


def _evaluation_data(path: Path) -> None:
    np.savez(path, x=np.zeros((4, 8), np.float32))


def _an_old_state(path: Path) -> None:
    np.savez(path, fingerprint=np.array("0" * 64), done=np.array(3))


def _an_empty_file(path: Path) -> None:
    path.touch()


def _the_start_of_a_header(path: Path) -> None:
    path.write_bytes(b"vernier calibration state")


def _another_version(path: Path) -> None:
    state(path).write(COUNTED)
    path.write_bytes(path.read_bytes().replace(b" state 1\n", b" state 2\n", 1))


def _a_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("text")


def _a_link_to_a_state(path: Path) -> None:
    target = path.with_name("target")
    state(target).write(COUNTED)
    path.symlink_to(target)


def _a_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("absent"))


def _a_pipe(path: Path) -> None:
    os.mkfifo(path)


def _a_file_in_the_way(path: Path) -> None:
    path.with_name(path.name + ".part").write_text("text")


FOREIGN = {
    _evaluation_data: "state holds no calibration state",
    _an_old_state: "state holds no calibration state",
    _an_empty_file: "state holds no calibration state",
    _the_start_of_a_header: "state holds no calibration state",
    _another_version: "state holds no calibration state of this version",
    _a_folder: "state is a folder",
    _a_link_to_a_state: "state is a link",
    _a_link_to_nothing: "state is a link",
    _a_pipe: "state is no regular file",
    _a_file_in_the_way: "state.part holds no calibration state",
}


@pytest.mark.parametrize(("make", "sentence"), FOREIGN.items())
def test_what_is_not_a_state_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None], sentence: str
) -> None:
    # np.savez adds the suffix to a name without one.
    path = tmp_path / "state"
    made = tmp_path / "made.npz"
    make(made if make in (_evaluation_data, _an_old_state) else path)
    if made.exists():
        made.rename(path)
    before = contents(tmp_path)
    for use in (check_path, lambda path: state(path).write(COUNTED)):
        with pytest.raises(ResumeError, match=f"{sentence}.*: give --resume the file that"):
            use(path)
    if make is not _a_file_in_the_way:
        with pytest.raises(ResumeError, match=sentence):
            state(path).read()
    state(path).remove()
    assert contents(tmp_path) == before
    assert path.is_fifo() == (make is _a_pipe)


def test_the_state_of_another_calibration_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state(path).write(COUNTED)
    other = state(path, "another model")
    check_path(path)
    for use in (other.read, lambda: other.write({"done": np.array(1)})):
        with pytest.raises(ResumeError, match=r"keeps the calibration of another build .*: remove it to"):
            use()
    other.remove()
    assert same(state(path).read())


def test_a_file_that_takes_the_place_of_the_state_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state"
    mine = state(path)
    mine.write(COUNTED)
    path.write_text("text")
    with pytest.raises(ResumeError, match="holds no calibration state"):
        mine.write(COUNTED)
    mine.remove()
    assert path.read_text() == "text"


def test_what_a_killed_build_was_writing_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state(path).write(COUNTED)
    half_written = path.read_bytes()[: HEADER_BYTES + 20]
    path.unlink()
    (tmp_path / "state.part").write_bytes(half_written)
    check_path(path)
    state(path).write(COUNTED)
    assert same(state(path).read())
    assert list(tmp_path.iterdir()) == [path]


def test_paths_where_no_file_can_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path, sentence in (
        (tmp_path / "absent" / "state", "there is no folder .*absent for the calibration state: make it"),
        (tmp_path / "file" / "state", "cannot read .*state: Not a directory; give"),
        (tmp_path / ("x" * 300), "cannot read .*: File name too long; give"),
    ):
        with pytest.raises(ResumeError, match=sentence):
            check_path(path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    state(path).write(COUNTED)

    def denied(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may read everything
    with pytest.raises(ResumeError, match=r"cannot read .*state: Permission denied; give"):
        check_path(path)


def test_a_write_that_fails_keeps_the_state_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    state(path).write(COUNTED)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResumeError, match=r"cannot write the calibration state .*: No space left on device"):
        state(path).write({"done": np.array(9)})
    assert same(state(path).read())
    assert list(tmp_path.iterdir()) == [path]
