"""Hashes, atomic publication, and the checks before any byte of a package is deserialized."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import Iterable, Iterator, List, Mapping, Optional

from vernier.errors import BuildError, PackageError
from vernier.package.manifest import FileEntry, Manifest, read_manifest

#: More than any version has. Python's int() raises ValueError from 4,300 digits on.
MAX_VERSION_DIGITS = 18
_CHUNK_BYTES = 1 << 20
_TEMPORARY_PREFIX = ".building-"
#: A folder that is younger may be about to be locked.
_ABANDONED_S = 60.0


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def file_entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)


def resolve_inside(package: Path, relative: str) -> Path:
    """The absolute path of a package's file. Raises PackageError when it would lie outside."""
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or not relative:
        raise PackageError(f"{package} names a file outside itself: '{relative}'; build the package again")
    path = package / pure
    if path.is_symlink() or not path.resolve().is_relative_to(package.resolve()):
        raise PackageError(f"{path} is a link that leaves the package; build the package again")
    return path


def verify_file(package: Path, relative: str, entry: FileEntry) -> Path:
    """Compares size and hash with the manifest's entry and returns the path. Raises PackageError."""
    path = resolve_inside(package, relative)
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise PackageError(
                f"{path} has {size} bytes, but its manifest says {entry.bytes}: it was truncated or "
                f"replaced; build the package again"
            )
        digest = sha256_file(path)
    except OSError as error:
        raise PackageError(f"cannot read {path}: {error.strerror}; build the package again") from error
    if digest != entry.sha256:
        raise PackageError(
            f"{path} does not have the sha256 of its manifest: it was changed after the build; "
            f"build the package again or restore the file"
        )
    return path


def verify_files(package: Path, manifest: Manifest, paths: Iterable[str]) -> List[Path]:
    """`verify_file` for each of `paths`, which the manifest must list."""
    verified = []
    for relative in paths:
        if relative not in manifest.files:
            raise PackageError(f"{package} has no hash for '{relative}'; build the package again")
        verified.append(verify_file(package, relative, manifest.files[relative]))
    return verified


def open_package(package: Path) -> Manifest:
    """Reads the manifest and verifies every file it lists (plans are verified when one is chosen).

    Raises PackageError; also when the folder's place (`<name>/<version>`) is not what the manifest says.
    """
    manifest = read_manifest(package)
    if (package.parent.name, package.name) != (manifest.name, str(manifest.version)):
        raise PackageError(
            f"{package} holds '{manifest.name}' version {manifest.version}; a package must lie in "
            f"<engines>/{manifest.name}/{manifest.version}"
        )
    verify_files(package, manifest, manifest.files)
    return manifest


def read_version(text: str) -> Optional[int]:
    """The number that a folder or a client writes for a version; None when `text` cannot be one."""
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_VERSION_DIGITS):
        return None
    return int(text)


def list_versions(model_dir: Path) -> List[int]:
    """The published versions under `engines/<model>`, ascending; temporary folders are skipped.

    Raises PackageError when the folder is there but cannot be read.
    """
    try:
        names = [entry.name for entry in model_dir.iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise PackageError(
            f"cannot read {model_dir}: {error.strerror}; let the service's user read it"
        ) from error
    return sorted(version for version in map(read_version, names) if version)


def _raise_if_full(error: OSError, target: Path) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise BuildError(
            f"the disk of {target} is full; nothing was written. Free some space and build again"
        ) from error


@contextlib.contextmanager
def staging_folder(model_dir: Path) -> Iterator[Path]:
    """A temporary folder beside the versions, removed on every way out unless `publish` renamed it.

    What killed builds of this and of other models have left under the same engines folder is removed too.
    Raises BuildError when the disk is full or the folder cannot be made.
    """
    folder: Optional[Path] = None
    try:
        with temporary_folder(model_dir, _TEMPORARY_PREFIX) as folder:
            for other in model_dir.parent.glob(f"*/{_TEMPORARY_PREFIX}*"):
                _remove_if_abandoned(other, folder)
            yield folder
    except OSError as error:
        _raise_if_full(error, model_dir)
        if folder is None:
            raise BuildError(
                f"cannot write to {model_dir}: {error.strerror}; choose another --out"
            ) from error
        raise


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str, mode: int = 0o777) -> Iterator[Path]:
    """A new folder under `parent`, removed on every way out unless it was renamed.

    It is locked as long as the process lives, and its name tells the process, so that the next build can tell
    folders of killed builds from those under way, and removes the former. Raises OSError.
    """
    folder = parent / f"{prefix}{_pid_space()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode, parents=True)
        with _locked(folder):
            for other in parent.glob(prefix + "*"):
                _remove_if_abandoned(other, folder)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock, which ends with the process; False when another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove_if_abandoned(folder: Path, mine: Path) -> None:
    """Removes a folder that nobody holds and whose builder is known to be dead, or that is old.

    Old is meant by the clock that the file system goes by: that of `mine`.
    """
    with contextlib.suppress(OSError):  # another build may be removing it, or may have published it
        if _builder_is_dead(folder) or mine.stat().st_mtime - folder.stat().st_mtime > _ABANDONED_S:
            with _locked(folder) as abandoned:
                if abandoned:
                    shutil.rmtree(folder)


def _builder_is_dead(folder: Path) -> bool:
    """Whether the process in the folder's name was one of this machine and container, and has ended."""
    parts = folder.name.split("-")
    if len(parts) < 4 or parts[-3] != _pid_space() or not parts[-2].isdigit():
        return False
    try:
        os.kill(int(parts[-2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _pid_space() -> str:
    """Where process numbers mean the same processes: this boot of this machine, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        return hashlib.sha256((boot + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:8]
    except OSError:
        return "unknown" + secrets.token_hex(4)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(staged: Path, model_dir: Path, version: int) -> Path:
    """Makes a finished folder visible as `<model_dir>/<version>` in one rename.

    Raises FileExistsError when another builder took the version first: the caller numbers again.
    """
    for path in staged.rglob("*"):
        if path.is_file():
            _sync(path)
    target = model_dir / str(version)
    try:
        os.rename(staged, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(target) from error
        raise
    _sync(model_dir)
    return target


def entries_of(folder: Path, skip: Iterable[str] = ()) -> Mapping[str, FileEntry]:
    """Relative path → entry for every file under `folder`, sorted, without those in `skip`."""
    skipped = set(skip)
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    relative = {p.relative_to(folder).as_posix(): p for p in paths}
    return {name: file_entry(p) for name, p in relative.items() if name not in skipped}
