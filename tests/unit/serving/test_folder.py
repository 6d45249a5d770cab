"""What two looks at the engines folder mean: new, changed, unfinished and vanished packages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.packages import write_package
from vernier.serving.models.folder import (
    SETTLED_S,
    Changes,
    Found,
    Key,
    Listing,
    Pending,
    compare,
    fingerprint,
    is_whole,
    list_packages,
    look,
)

ONE, TWO, OTHER = ("ranker", 1), ("ranker", 2), ("speech", 1)
OLD, NEW = (("manifest.json", 9, 1),), (("manifest.json", 9, 2),)
NOTHING = Changes([], [], [])


def listing(*whole: Key, partial: tuple[Key, ...] = (), files: object = OLD) -> Listing:
    found = {key: Found(files, key not in partial) for key in (*whole, *partial)}  # type: ignore[arg-type]
    return Listing(found)


def test_a_new_package_is_loaded_and_a_known_one_is_not() -> None:
    changes, _ = compare(listing(ONE, TWO), {ONE}, {ONE: OLD}, Pending(), 0.0)
    assert changes == Changes([TWO], [], [])


@pytest.mark.parametrize("served", [{ONE}, set()], ids=["served", "refused or unloaded by hand"])
def test_what_was_tried_is_tried_again_when_its_files_have_changed(served: set[Key]) -> None:
    assert compare(listing(ONE), served, {ONE: OLD}, Pending(), 0.0)[0] == NOTHING
    assert compare(listing(ONE, files=NEW), served, {ONE: OLD}, Pending(), 0.0)[0].load == [ONE]


def test_an_unfinished_package_waits_as_long_as_its_files_change_and_is_then_tried_as_it_is() -> None:
    pending = Pending()
    for second in range(100):  # a slow copy
        files = (("manifest.json", second, second),)
        changes, pending = compare(listing(partial=(ONE,), files=files), set(), {}, pending, float(second))
        assert changes == NOTHING
    changes, pending = compare(listing(partial=(ONE,), files=files), set(), {}, pending, 98 + SETTLED_S)
    assert changes == NOTHING
    changes, pending = compare(listing(partial=(ONE,), files=files), set(), {}, pending, 99 + SETTLED_S)
    assert changes.load == [ONE]
    assert pending == Pending()


def test_an_unfinished_package_is_loaded_as_soon_as_it_is_whole() -> None:
    _, pending = compare(listing(partial=(ONE,)), set(), {}, Pending(), 0.0)
    changes, pending = compare(listing(ONE, files=NEW), set(), {}, pending, 0.1)
    assert changes.load == [ONE]
    assert not pending.partial


def test_a_package_that_has_vanished_for_two_looks_is_gone() -> None:
    tried = {ONE: OLD, TWO: OLD, OTHER: OLD}
    changes, pending = compare(listing(TWO), {ONE, TWO}, tried, Pending(), 0.0)
    assert changes == NOTHING
    changes, _ = compare(listing(TWO), {ONE, TWO}, tried, pending, 1.0)
    assert changes == Changes([], [ONE, OTHER], [])
    changes, _ = compare(listing(ONE, TWO, OTHER), {ONE, TWO}, tried, pending, 1.0)
    assert changes == NOTHING  # it was being replaced


def test_all_that_is_served_stays_when_its_folders_vanish_and_that_is_said_once() -> None:
    _, pending = compare(listing(), {ONE, OTHER}, {ONE: OLD, OTHER: OLD}, Pending(), 0.0)
    changes, pending = compare(listing(), {ONE, OTHER}, {ONE: OLD, OTHER: OLD}, pending, 1.0)
    assert changes == Changes([], [], [ONE, OTHER])
    changes, pending = compare(listing(), {ONE, OTHER}, {ONE: OLD, OTHER: OLD}, pending, 2.0)
    assert changes == NOTHING
    changes, pending = compare(listing(ONE, OTHER), {ONE, OTHER}, {ONE: OLD, OTHER: OLD}, pending, 3.0)
    assert changes == NOTHING  # the mount is back
    changes, _ = compare(
        listing(TWO), {ONE, TWO}, {ONE: OLD, TWO: OLD}, Pending(missing=frozenset({ONE})), 4.0
    )
    assert changes.gone == [ONE]  # something else is served now


def test_models_of_a_folder_that_cannot_be_read_are_not_gone() -> None:
    unreadable = Listing({OTHER: Found(OLD, True)}, {"ranker": "Permission denied"})
    pending = Pending()
    for now in range(3):
        changes, pending = compare(unreadable, {ONE, OTHER}, {ONE: OLD, OTHER: OLD}, pending, float(now))
        assert changes == NOTHING


def test_a_copy_is_whole_when_its_last_byte_is_there(engines: Path, tmp_path: Path) -> None:
    source = write_package(tmp_path, "mlp")
    target = engines / "mlp" / "1"
    target.mkdir(parents=True)
    seen = {fingerprint(target)}
    for path in sorted(source.iterdir(), reverse=True):  # the manifest before the model
        data = path.read_bytes()
        for part in (data[: len(data) // 2], data):
            assert not is_whole(target)
            (target / path.name).write_bytes(part)
            seen.add(fingerprint(target))
    assert is_whole(target)
    assert len(seen) == 1 + 2 * len(list(source.iterdir()))


def test_a_manifest_that_names_files_outside_is_not_whole(engines: Path) -> None:
    package = write_package(engines)
    text = (package / "manifest.json").read_text()
    (package / "manifest.json").write_text(text.replace('"golden.npz"', '"../../golden.npz"'))
    (engines / "golden.npz").write_bytes((package / "golden.npz").read_bytes())
    assert not is_whole(package)


def test_a_served_package_without_a_manifest_is_being_removed(engines: Path) -> None:
    package = write_package(engines)
    tried = {("mlp", 1): fingerprint(package)}
    assert set(look(engines, {("mlp", 1)}, tried).packages) == {("mlp", 1)}
    (package / "manifest.json").unlink()
    assert not look(engines, {("mlp", 1)}, tried).packages
    assert not look(engines, set(), {}).packages["mlp", 1].whole


def test_hidden_folders_and_files_are_no_packages(engines: Path) -> None:
    package = write_package(engines)
    shutil.copytree(package, engines / ".cache" / "1")
    shutil.copytree(package, engines / "mlp" / ".building-7-abc")
    (engines / "README.md").write_text("no package")
    (engines / "mlp" / "2").write_text("no folder")
    assert set(list_packages(engines).packages) == {("mlp", 1)}
    assert not list_packages(engines / "missing").packages
