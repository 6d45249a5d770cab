"""`python -m scripts.backport FOLDER`: a copy of the service that runs on Python 3.9.

TensorRT's bindings exist only for certain Pythons, those of 8.5 for none newer than 3.10. The engine side is
written for 3.9; this copies the rest too, with what came after 3.9 written as 3.9 has it, so that the
whole service can be proven on such a TensorRT (`tests/gpu/test_service.py`). Comments are lost; it is no
source to read or to edit. Needs Python 3.11 or newer to run, and on the other side async-timeout, tomli and
typing-extensions.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What typing gained after 3.9.
_NEW_IN_TYPING = {"Concatenate", "LiteralString", "Never", "NotRequired", "ParamSpec", "Required", "Self"}
_NEW_IN_TYPING |= {
    "TypeAlias",
    "TypeGuard",
    "Unpack",
    "assert_never",
    "assert_type",
    "override",
    "reveal_type",
}
_BUILTIN_TYPES = {"bool", "bytearray", "bytes", "dict", "float", "int", "list", "memoryview", "object", "set"}
_BUILTIN_TYPES |= {"str", "tuple", "type"}


def _is_type(node: ast.expr) -> bool:
    """Whether an operand of `|` is a type. Ours are named in capitals; flags of `re` and the like are not met."""
    if isinstance(node, ast.Constant):
        return node.value is None or isinstance(node.value, str)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr) and (_is_type(node.left) or _is_type(node.right))
    if isinstance(node, ast.Subscript):
        return _is_type(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr[:1].isupper() and not node.attr.isupper()
    return isinstance(node, ast.Name) and (
        node.id in _BUILTIN_TYPES or (node.id[:1].isupper() and not node.id.isupper())
    )


def _operands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_operands(node.left), *_operands(node.right)]
    return [node]


def _holds_strings(node: ast.JoinedStr) -> bool:
    """Whether an expression in an f-string holds a string, which Python 3.12 writes with the f-string's own quotes."""
    values = [value.value for value in node.values if isinstance(value, ast.FormattedValue)]
    inside = [found for value in values for found in ast.walk(value)]
    return any(
        isinstance(found, ast.JoinedStr)
        or (isinstance(found, ast.Constant) and isinstance(found.value, (str, bytes)))
        for found in inside
    )


def _template(parts: list[ast.expr], arguments: list[ast.expr], is_spec: bool = False) -> str:
    """An f-string's parts as `str.format` takes them; what is to be formatted is appended to `arguments`."""
    text = ""
    for part in parts:
        if isinstance(part, ast.FormattedValue):
            arguments.append(part.value)
            text += "{" + (f"!{chr(part.conversion)}" if part.conversion >= 0 else "")
            if isinstance(part.format_spec, ast.JoinedStr):
                text += ":" + _template(part.format_spec.values, arguments, is_spec=True)
            text += "}"
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            text += part.value if is_spec else part.value.replace("{", "{{").replace("}", "}}")
    return text


class _Backport(ast.NodeTransformer):
    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        if not _holds_strings(node):
            self.generic_visit(node)
            return node
        arguments: list[ast.expr] = []
        template = ast.Constant(_template(node.values, arguments))
        made = ast.Call(ast.Attribute(template, "format", ast.Load()), arguments, [])
        self.generic_visit(made)
        return made

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        union = isinstance(node.op, ast.BitOr) and (_is_type(node.left) or _is_type(node.right))
        operands = _operands(node) if union else []
        self.generic_visit(node)
        if not union:
            return node
        members: list[ast.expr] = [self.visit(operand) for operand in operands]
        return ast.Subscript(
            ast.parse("_typing.Union", mode="eval").body, ast.Tuple(members, ast.Load()), ast.Load()
        )

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = ast.unparse(node.func)
        if name == "isinstance" and isinstance(node.args[1], ast.BinOp):
            node.args[1] = ast.Tuple(_operands(node.args[1]), ast.Load())
        self.generic_visit(node)
        if name == "zip":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        elif name in ("dataclass", "dataclasses.dataclass", "field"):
            node.keywords = [k for k in node.keywords if k.arg not in ("slots", "kw_only")]
        elif name == "asyncio.timeout":
            node.func = ast.parse("_async_timeout.timeout", mode="eval").body
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.ExceptHandler:
        self.generic_visit(node)
        if isinstance(node.type, ast.Name) and node.type.id == "TimeoutError":
            node.type = ast.parse("(TimeoutError, _asyncio.TimeoutError)", mode="eval").body
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        for alias in node.names:
            if alias.name == "tomllib":
                alias.name, alias.asname = "tomli", "tomllib"
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | list[ast.stmt]:
        if node.module == "itertools" and any(alias.name == "pairwise" for alias in node.names):
            node.names = [alias for alias in node.names if alias.name != "pairwise"]
            return [*([node] if node.names else []), *ast.parse(_PAIRWISE).body]
        new = [alias for alias in node.names if alias.name in _NEW_IN_TYPING]
        if node.module != "typing" or not new:
            return node
        old = [alias for alias in node.names if alias not in new]
        moved: list[ast.stmt] = [ast.ImportFrom("typing_extensions", new, 0)]
        return [*moved, ast.ImportFrom("typing", old, 0)] if old else moved


#: As itertools explains it, for sequences.
_PAIRWISE = "def pairwise(items):\n    return zip(items, items[1:])\n"
_PRELUDE = "import asyncio as _asyncio\nimport typing as _typing\n"


def backport(source: str) -> str:
    """The same module for Python 3.9. Raises SyntaxError when it holds what this does not know."""
    tree = ast.fix_missing_locations(_Backport().visit(ast.parse(source)))
    body: list[ast.stmt] = tree.body
    at = 0
    while at < len(body) and (
        (at == 0 and isinstance(body[0], ast.Expr))
        or (isinstance(body[at], ast.ImportFrom) and getattr(body[at], "module", "") == "__future__")
    ):
        at += 1
    prelude = _PRELUDE + (
        "import async_timeout as _async_timeout\n" if "_async_timeout" in ast.unparse(tree) else ""
    )
    tree.body[at:at] = ast.parse(prelude).body
    text = ast.unparse(tree) + "\n"
    ast.parse(text, feature_version=(3, 9))
    return text


def backport_app(out: Path) -> None:
    """Writes `app/vernier` and what lies beside its modules to `out`."""
    for path in sorted((ROOT / "app" / "vernier").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            target = out / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                target.write_text(backport(path.read_text("utf-8")), "utf-8")
            else:
                target.write_bytes(path.read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    backport_app(parser.parse_args().out)
