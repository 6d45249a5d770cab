"""Which names of TensorRT's classes the code uses, read from its syntax trees; also run on a GPU host."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: file → variable or attribute that holds an object of TensorRT → its class
OBJECTS: dict[str, dict[str, str]] = {
    "app/vernier/engine/trt_runtime/trt.py": {
        "engine": "ICudaEngine",
        "_runtime": "Runtime",
        "config": "IRuntimeConfig",
        "cache": "IRuntimeCache",
        "_runtime_cache": "IRuntimeCache",
    },
    "app/vernier/engine/trt_runtime/trt_slot.py": {
        "context": "IExecutionContext",
        "_context": "IExecutionContext",
    },
    "app/vernier/engine/trt_runtime/trt_outputs.py": {"context": "IExecutionContext"},
    "app/vernier/engine/trt_runtime/trt_api.py": {"runtime": "Runtime", "engine": "ICudaEngine"},
    "app/vernier/builder/plans/plan.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "config": "IBuilderConfig",
        "cache": "ITimingCache",
        "empty": "ITimingCache",
        "parser": "OnnxParser",
        "profile": "IOptimizationProfile",
        "tensor": "ITensor",
        "error": "ParserError",
    },
    "app/vernier/builder/plans/plan_layers.py": {
        "network": "INetworkDefinition",
        "layer": "ILayer",
        "tensor": "ITensor",
        "engine": "ICudaEngine",
    },
}

#: Names of our own on variables that also hold TensorRT's objects.
OURS = {("app/vernier/builder/plans/plan.py", "error", "strerror")}


def used_names() -> set[tuple[str, str]]:
    """(class, name) of every attribute that the code takes of an object of TensorRT."""
    found: set[tuple[str, str]] = set()
    for path, objects in OBJECTS.items():
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            name = (
                owner.id
                if isinstance(owner, ast.Name)
                else owner.attr
                if isinstance(owner, ast.Attribute)
                else ""
            )
            if name in objects and (path, name, node.attr) not in OURS:
                found.add((objects[name], node.attr))
    return found


def module_names() -> set[str]:
    """The attributes that the code takes of the package itself: `trt.X` and `….module.X`."""
    found: set[str] = set()
    for path in OBJECTS:
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value
                named = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if named in ("trt", "module") and not node.attr.startswith("__"):
                    found.add(node.attr)
    return found


def missing(module: Any, names: set[tuple[str, str]]) -> list[str]:
    """`Class.name` for each name that the package's class does not have, sorted."""
    return sorted(_missing(module, names))


def _missing(module: Any, names: set[tuple[str, str]]) -> Iterator[str]:
    for class_name, name in names:
        if not hasattr(getattr(module, class_name, None), name):
            yield f"{class_name}.{name}"
