"""The file in which a calibration keeps what was counted so far, so that an interrupted build goes on there.

The file begins with a header: a magic text with the version of the format, the sha256 of what is calibrated,
the sha256 of what follows. Only a regular file with that header, of the same calibration, is ever replaced
or removed: any other file at that path may be the only copy of something.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vernier.errors import ResumeError
from vernier.tensors import Array, Arrays

_MAGIC = b"vernier calibration state 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
HEADER_BYTES = len(_MAGIC) + 2 * _DIGEST_BYTES
_OTHER_PATH = "give --resume the file that an interrupted build left, or a path where there is no file yet"


class CalibrationState:
    """The state of one calibration at `path`.

    Args:
        subject: names what is calibrated; a state is of use for an equal subject alone.
    """

    def __init__(self, path: Path, subject: str) -> None:
        self._path = path
        self._subject = hashlib.sha256(subject.encode()).digest()

    def read(self) -> Arrays | None:
        """What was written last; None where there is no file or its contents are damaged.

        Raises ResumeError for a file that `write` must not replace.
        """
        if not self._is_there():
            return None
        try:
            contents = self._path.read_bytes()
        except OSError as error:
            raise _unreadable(self._path, error) from error
        digest, payload = contents[HEADER_BYTES - _DIGEST_BYTES : HEADER_BYTES], contents[HEADER_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            return dict(archive)

    def write(self, arrays: Mapping[str, Array]) -> None:
        """Replaces the state, at once or not at all. Raises ResumeError, also when the disk is full."""
        self._is_there()
        stream = io.BytesIO()
        np.savez(stream, **arrays)  # type: ignore[arg-type]
        payload = stream.getvalue()
        temporary = _temporary(self._path)
        try:
            if _header(temporary) is not None:
                temporary.unlink()
            with temporary.open("xb") as file:
                try:
                    file.write(_MAGIC + self._subject + hashlib.sha256(payload).digest() + payload)
                    file.flush()
                    os.fsync(file.fileno())  # else a power failure may leave an empty file, which is refused
                    os.replace(temporary, self._path)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise ResumeError(
                f"cannot write the calibration state {self._path}: {error.strerror}; give --resume another path"
            ) from error

    def remove(self) -> None:
        """Removes the file if it holds this state, and leaves every other file alone."""
        # The calibration is done: a file that stays does no harm, and a build that fails now would.
        with contextlib.suppress(ResumeError, OSError):
            if self._is_there():
                self._path.unlink()

    def _is_there(self) -> bool:
        """False where there is no file. Raises ResumeError for a file that is not a state of this calibration."""
        header = _header(self._path)
        if header is None:
            return False
        if header[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES] != self._subject:
            raise ResumeError(
                f"{self._path} keeps the calibration of another build (another model, other data or "
                f"precisions): remove it to start anew, or give --resume another path"
            )
        return True


def check_path(path: Path) -> None:
    """Raises ResumeError unless `path` holds the state of some calibration, or no file and can get one."""
    _header(path)
    _header(_temporary(path))


def _temporary(path: Path) -> Path:
    """A path of its own beside `path`, the same each time: a killed build's file is found and replaced."""
    return path.with_name(path.name + ".part")


def _header(path: Path) -> bytes | None:
    """The header at `path`, shorter where the file is cut off; None where there is no file.

    Raises ResumeError for a file that is not a state.
    """
    try:
        mode = path.lstat().st_mode
        # Before it is opened: a pipe would wait for a writer.
        if not stat.S_ISREG(mode):
            what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise ResumeError(f"{path} is {what}: {_OTHER_PATH}")
        with path.open("rb") as stream:
            header = stream.read(HEADER_BYTES)
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise ResumeError(
                f"there is no folder {path.parent} for the calibration state: make it, or give --resume "
                f"another path"
            ) from error
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    if not header.startswith(_MAGIC):
        raise ResumeError(f"{path} holds no calibration state of this version, so it is kept: {_OTHER_PATH}")
    return header


def _unreadable(path: Path, error: OSError) -> ResumeError:
    return ResumeError(f"cannot read {path}: {error.strerror}; {_OTHER_PATH}")
