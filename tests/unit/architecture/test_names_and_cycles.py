"""No module imports itself through others, and every class has a name of its own; read from the syntax trees."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

APP = Path(__file__).resolve().parents[3] / "app"


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


def test_no_module_imports_itself_through_others() -> None:
    assert cycle(graph(trees())) == []


def test_a_cycle_is_found_through_type_checking_and_functions() -> None:
    one = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vernier.two import B"
    two = "def late():\n    import vernier.one"
    edges = graph({"vernier.one": ast.parse(one), "vernier.two": ast.parse(two)})
    assert set(cycle(edges)) == {"vernier.one", "vernier.two"}
    assert cycle(graph({"vernier.one": ast.parse(one), "vernier.two": ast.parse("")})) == []


def test_every_class_has_a_name_of_its_own() -> None:
    homes = defaultdict(list)
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    twins = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert twins == {}
