"""Every test that lies here is run: pytest skips folders of some names, such as `build`, and says nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
#: Prints what pytest, as it is configured here, takes for a file of tests; none of them is imported.
LIST = """
import pytest

class Empty(pytest.Module):
    def collect(self):
        return []

class Lister:
    def pytest_pycollect_makemodule(self, module_path, parent):
        print(f"module:{module_path}")
        return Empty.from_parent(parent, path=module_path)

pytest.main(["--collect-only", "-q", "-s"], plugins=[Lister()])
"""
_TEST = re.compile(r"^(    )?(async )?def test_", re.MULTILINE)


def test_pytest_collects_every_file_that_holds_tests() -> None:
    done = subprocess.run([sys.executable, "-c", LIST], cwd=ROOT, capture_output=True, text=True)
    prefix = f"module:{ROOT}/"
    collected = {line.removeprefix(prefix) for line in done.stdout.splitlines() if line.startswith(prefix)}
    written = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if _TEST.search(path.read_text("utf-8"))
    }
    assert "tests/unit/architecture/test_collection.py" in collected, done.stdout + done.stderr
    assert sorted(written - collected) == []
