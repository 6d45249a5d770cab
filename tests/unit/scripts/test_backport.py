"""The copy of the service for Python 3.9, as far as a newer Python can judge it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.backport import backport, backport_app


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("def f(x: int | None): ...", "def f(x: _typing.Union[int, None]):"),
        ("Body = bytes | bytearray | memoryview", "Body = _typing.Union[bytes, bytearray, memoryview]"),
        ("x: list[int | None] | None", "x: _typing.Union[list[_typing.Union[int, None]], None]"),
        ("flags = re.I | re.M", "flags = re.I | re.M"),
        ("merged = options | {'a': 1}", "merged = options | {'a': 1}"),
        ("isinstance(x, Late | Early)", "isinstance(x, (Late, Early))"),
        ("zip(a, b, strict=True)", "zip(a, b)"),
        ("@dataclass(frozen=True, slots=True)\nclass A: ...", "@dataclass(frozen=True)\nclass A:"),
        ("import tomllib", "import tomli as tomllib"),
        ("from itertools import pairwise", "def pairwise(items):\n    return zip(items, items[1:])"),
        ("from itertools import chain, pairwise", "from itertools import chain\n\ndef pairwise(items):"),
        ("from typing import Any, Self", "from typing_extensions import Self\nfrom typing import Any"),
    ],
)  # fmt: skip
def test_newer_syntax_becomes_older(new: str, old: str) -> None:
    assert old in backport(new)


@pytest.mark.parametrize(
    "text",
    [
        """f"{names['a']}, {', '.join(names)}" """,
        """f"{{{'x'!r:>{width}}}} {width:03d} {'b' if width else ''}" """,
        """f"{f'{width}' + 'é'}" """,
    ],
)
def test_strings_inside_f_strings_do_not_need_quotes_that_python_3_9_cannot_nest(text: str) -> None:
    """Python 3.12 and newer write both with the same quotes."""
    text = text.strip()
    written = backport(f"found = {text}").splitlines()[-1].partition(" = ")[2]
    assert ".format(" in written
    before = "names, width = {'a': 1, 'b': 2}, 5\n"
    program = f"{before}assert {written} == {text}, {written}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_other_f_strings_stay_as_they_are() -> None:
    assert "f'{a.b:>{width}} {c!r}'" in backport("x = f'{a.b:>{width}} {c!r}'")


def test_what_python_3_9_cannot_parse_is_an_error() -> None:
    with pytest.raises(SyntaxError):
        backport("match x:\n    case 1: pass\n")


def test_every_module_of_the_service_has_a_copy_that_python_3_9_parses(tmp_path: Path) -> None:
    backport_app(tmp_path)
    copies = list((tmp_path / "app").rglob("*.py"))
    assert len(copies) > 100
    for copy in copies:
        text = copy.read_text()
        ast.parse(text, feature_version=(3, 9))
        assert not re.search(r"slots=True|strict=True\)|asyncio\.timeout\(|\| None", text), copy
    assert (tmp_path / "app/vernier/builder/reports/templates/report.html.j2").is_file()


def test_what_serves_needs_nothing_that_python_3_9_lacks(tmp_path: Path) -> None:
    backport_app(tmp_path)
    for builder in ("builder", "tune"):  # run where newer Pythons are
        shutil.rmtree(tmp_path / "app" / "vernier" / builder)
    vermin = Path(sys.executable).with_name("vermin")
    command = [vermin, "--target=3.9-", "--violations", "--eval-annotations", "--no-tips"]
    found = subprocess.run([*command, tmp_path / "app"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    (tmp_path / "app" / "vernier" / "newer.py").write_text("from itertools import pairwise\n")
    found = subprocess.run([*command, tmp_path / "app"], capture_output=True, text=True, check=False)
    assert "'itertools.pairwise' member requires" in found.stdout
