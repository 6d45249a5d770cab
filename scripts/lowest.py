"""Prints the requirements of requirements/lowest.txt: the service's lower bounds in pyproject.toml as pins, and what
tests need.

    python -m scripts.lowest | python -m piptools compile … -
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
#: These need not be old (`onnx` writes the tests' packages): they are taken as requirements/dev.txt has them.
TOOLS = ("onnx", "pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "httpx")


def lower_bounds(pyproject: Path) -> dict[str, Requirement]:
    """Name → the dependency with its lower bound as a pin. Raises ValueError where there is no lower bound."""
    pinned = {}
    for text in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
        requirement = Requirement(text)
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"'{text}' in {pyproject} has no lower bound; write one, such as >=1.0")
        requirement.specifier = SpecifierSet(f"=={bounds[0]}")
        pinned[requirement.name] = requirement
    return pinned


def locked(name: str, lock: Path) -> str:
    """The version of `name` in a lock file. Raises ValueError when it has none."""
    found = re.search(rf"^{re.escape(name)}==(\S+)", lock.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{lock} does not pin {name}; run make lock")
    return found[1]


def main() -> None:
    for requirement in lower_bounds(ROOT / "pyproject.toml").values():
        print(requirement)
    for name in TOOLS:
        print(f"{name}=={locked(name, ROOT / 'requirements/dev.txt')}")


if __name__ == "__main__":
    main()
