"""What lies in the engines folder, and what has changed there: the watch's decisions, as pure functions of two looks.

A package is known by its `Fingerprint` when it was last tried: loaded, refused or unloaded by hand. It is tried again
when its files have changed since, and only when all files of its manifest have their sizes: `cp -r` makes a package
visible before it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vernier.errors import PackageError
from vernier.package.integrity import list_versions, resolve_inside
from vernier.package.manifest import MANIFEST_NAME, read_manifest

#: Name and version of a package.
Key = tuple[str, int]

#: (path inside the package, bytes, time of the last change in ns) of every file, sorted.
Fingerprint = tuple[tuple[str, int, int], ...]

#: An unfinished package whose files have not changed for so long is tried as it is, so that the log names its fault.
SETTLED_S = 10.0


@dataclass(frozen=True)
class Found:
    """A package at one look. `whole`: its manifest can be read and its files have the sizes that it gives."""

    files: Fingerprint
    whole: bool


@dataclass(frozen=True)
class Listing:
    """One look. `unreadable`: model → why its folder could not be read."""

    packages: Mapping[Key, Found]
    unreadable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pending:
    """What a look leaves to the next one.

    partial: unfinished packages: their files, and the time in seconds since when these have not changed.
    missing: packages that were known and not found; a second look decides, since replacing takes two steps.
    kept: what stood in `Changes.kept` and is still not there.
    """

    partial: Mapping[Key, tuple[Fingerprint, float]] = field(default_factory=dict)
    missing: frozenset[Key] = frozenset()
    kept: frozenset[Key] = frozenset()
    unreadable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Changes:
    """What is to be done, in this order.

    load: new or changed packages. gone: known packages whose folders have vanished.
    kept: packages that have vanished too, but are all that is served, since a lost mount looks the same; said once.
    """

    load: list[Key]
    gone: list[Key]
    kept: list[Key]


def compare(
    listing: Listing, served: Collection[Key], tried: Mapping[Key, Fingerprint], pending: Pending, now: float
) -> tuple[Changes, Pending]:
    """What has changed since the packages were tried.

    Args:
        served: packages that answer requests.
        tried: every package that was loaded, refused or unloaded by hand, with its files then.
        pending: what the look before has left.
        now: in seconds, monotonic.
    """
    load: list[Key] = []
    partial: dict[Key, tuple[Fingerprint, float]] = {}
    for key, found in sorted(listing.packages.items()):
        if found.files == tried.get(key):
            continue
        if not found.whole:
            before, since = pending.partial.get(key, ((), now))
            since = since if before == found.files else now
            if now - since < SETTLED_S:
                partial[key] = found.files, since
                continue
        load.append(key)
    known = {*served, *tried}
    missing = {key for key in known - set(listing.packages) if key[0] not in listing.unreadable}
    gone = sorted(missing & pending.missing)
    kept = frozenset(key for key in gone if key in served) if missing.issuperset(served) else frozenset()
    return (
        Changes(load, [key for key in gone if key not in kept], sorted(kept - pending.kept)),
        Pending(partial, frozenset(missing), kept, frozenset(listing.unreadable)),
    )


def list_packages(engines: Path) -> Listing:
    """Every package under `engines`; not whether it is whole. Raises OSError when `engines` cannot be read."""
    packages: dict[Key, Found] = {}
    unreadable: dict[str, str] = {}
    for name in _model_names(engines):
        try:
            versions = list_versions(engines / name)
        except PackageError as error:
            unreadable[name] = error.message
            continue
        for version in versions:
            packages[name, version] = Found(fingerprint(engines / name / str(version)), True)
    return Listing(packages, unreadable)


def look(engines: Path, served: Collection[Key], tried: Mapping[Key, Fingerprint]) -> Listing:
    """As `list_packages`, with a check of those that are not as they were tried. Raises OSError.

    A served package without a manifest counts as not there: its folder is being removed.
    """
    listing = list_packages(engines)
    packages: dict[Key, Found] = {}
    for key, found in listing.packages.items():
        if found.files != tried.get(key):
            if key in served and all(path != MANIFEST_NAME for path, _, _ in found.files):
                continue
            found = Found(found.files, is_whole(engines / key[0] / str(key[1])))
        packages[key] = found
    return Listing(packages, listing.unreadable)


def fingerprint(package: Path) -> Fingerprint:
    """Empty when the package is not there."""
    found: list[tuple[str, int, int]] = []
    for folder, _, names in os.walk(package):
        for name in names:
            path = Path(folder, name)
            try:
                status = path.stat()
            except OSError:  # it is being removed, or a link leads nowhere
                continue
            found.append((path.relative_to(package).as_posix(), status.st_size, status.st_mtime_ns))
    return tuple(sorted(found))


def is_whole(package: Path) -> bool:
    """Whether every file that the manifest names has its size; hashes are verified when the package is loaded."""
    try:
        manifest = read_manifest(package)
        sizes = {path: entry.bytes for path, entry in manifest.files.items()}
        sizes |= {plan.path: plan.bytes for plan in manifest.plans}
        return all(resolve_inside(package, path).stat().st_size == size for path, size in sizes.items())
    except (PackageError, OSError):
        return False


def _model_names(engines: Path) -> list[str]:
    """Raises OSError."""
    try:
        entries = list(engines.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(p.name for p in entries if not p.name.startswith(".") and p.is_dir())
