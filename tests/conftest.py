from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """An empty engines folder."""
    folder = tmp_path / "engines"
    folder.mkdir()
    return folder
