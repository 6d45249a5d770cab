from __future__ import annotations

import os
from pathlib import Path

import pytest

# What a test starts imports the same package as the test does.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).resolve().parents[1] / "app"), os.environ.get("PYTHONPATH")])
)


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """An empty engines folder."""
    folder = tmp_path / "engines"
    folder.mkdir()
    return folder
