"""No module imports itself through others, and every class has a name of its own; read from the syntax trees."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

APP = Path(__file__).resolve().parents[3] / "app"
#: Modules that still form a cycle together. A cycle that is gone must leave this list.
KNOWN_CYCLES = [
    {"vernier.border.front_session", "vernier.border.serving_fronts"},
    {
        "vernier.builder.charts",
        "vernier.builder.overview",
        "vernier.builder.report",
        "vernier.builder.report_page",
    },
]
#: Names that still stand for several classes. One that is unique must leave this list.
KNOWN_TWINS = {"Charge", "Connection", "ErrorAnswer"}


def trees() -> dict[str, ast.Module]:
    """Module → syntax tree, of every module of the package."""
    found = {}
    for path in sorted(APP.rglob("*.py")):
        parts = path.relative_to(APP).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text("utf-8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Every module that may be meant by an import, for type checking and inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def graph(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    return {name: imports(tree) & modules.keys() - {name} for name, tree in modules.items()}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle; none when there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def without(edges: dict[str, set[str]], members: set[str]) -> dict[str, set[str]]:
    """The graph without the imports of these modules among each other."""
    return {name: targets - members if name in members else targets for name, targets in edges.items()}


def test_no_module_imports_itself_through_others() -> None:
    edges = graph(trees())
    for members in KNOWN_CYCLES:
        edges = without(edges, members)
    assert cycle(edges) == []


@pytest.mark.parametrize("members", KNOWN_CYCLES, ids=lambda members: min(members))
def test_the_known_cycles_are_still_there(members: set[str]) -> None:
    edges = graph(trees())
    assert cycle({name: edges.get(name, set()) & members for name in members}), "take it off the list"


def test_a_cycle_is_found_through_type_checking_and_functions() -> None:
    one = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vernier.two import B"
    two = "def late():\n    import vernier.one"
    edges = graph({"vernier.one": ast.parse(one), "vernier.two": ast.parse(two)})
    assert set(cycle(edges)) == {"vernier.one", "vernier.two"}
    assert cycle(without(edges, {"vernier.one", "vernier.two"})) == []


def test_every_class_has_a_name_of_its_own() -> None:
    homes = defaultdict(list)
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    twins = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert twins.keys() == KNOWN_TWINS, twins
