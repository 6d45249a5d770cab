"""The lower bounds of pyproject.toml are those that `make test-lowest` runs, and lock files name no registry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts.lowest import TOOLS, locked, lower_bounds

ROOT = Path(__file__).resolve().parents[3]
LOWEST = ROOT / "requirements" / "lowest.txt"


def pins(lock: Path) -> dict[str, Version]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", lock.read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    pinned = pins(LOWEST)
    for name, requirement in lower_bounds(ROOT / "pyproject.toml").items():
        assert pinned[canonicalize_name(name)] in requirement.specifier, f"{requirement}: run `make lock`"
    for name in TOOLS:
        assert pinned[name] == Version(locked(name, ROOT / "requirements" / "dev.txt")), (
            f"{name}: run `make lock`"
        )


def test_the_versions_that_are_developed_with_lie_within_the_bounds() -> None:
    pinned = pins(ROOT / "requirements" / "dev.txt")
    for name, requirement in lower_bounds(ROOT / "pyproject.toml").items():
        (lowest,) = requirement.specifier
        assert pinned[canonicalize_name(name)] >= Version(lowest.version), name


def test_a_requirement_without_a_lower_bound_is_refused(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\ndependencies = ["fastapi<2"]\n')
    with pytest.raises(ValueError, match="fastapi<2"):
        lower_bounds(pyproject)


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_lock_files_pin_every_package_by_hash_and_name_no_registry(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    assert "--index-url" not in text
    for block in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block
