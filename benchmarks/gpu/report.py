"""Results of a run on a GPU as a page: tables, and each goal with what was reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def write_page(results: Dict[str, Any], page: Path) -> None:
    """Replaces what lies between the two marks of `page`; the words around them are written by hand."""
    before, after = f"# Speed on a GPU\n\n{BEGIN}\n", f"\n{END}\n"
    if page.is_file() and BEGIN in page.read_text("utf-8"):
        text = page.read_text("utf-8")
        before = text[: text.index(BEGIN)] + BEGIN + "\n"
        after = text[text.index(END) - 1 :]
    page.write_text(before + tables(results) + after, "utf-8")


def tables(results: Dict[str, Any]) -> str:
    return "machine: " + str(results["machine"]) + "\n"
