"""The page at /docs: the interface as the OpenAPI description has it, in one HTML text without scripts or other files.

Swagger UI comes from a content network, which a GPU host often does not reach.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response

router = APIRouter(include_in_schema=False)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h2 { margin-top: 2.5rem; text-transform: capitalize }
h3 { margin: 0 } code, pre { font: 14px/1.45 ui-monospace, monospace }
article { border: 1px solid #d0d7de; border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0 }
pre { background: #f6f8fa; padding: .7rem; border-radius: 6px; overflow: auto }
summary { cursor: pointer; color: #0550ae }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .7rem .25rem 0; vertical-align: top }
.method { display: inline-block; min-width: 3.6rem; color: #0550ae } p { margin: .4rem 0; white-space: pre-line }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3 } pre { background: #161b22 }
  article { border-color: #30363d } summary, .method, a { color: #79c0ff } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_ROW = re.compile(r"\[\n([^\[\]{}]*)\n\s*\]")
_METHODS = ("get", "post", "put", "patch", "delete")


@router.get("/docs")
async def docs(request: Request) -> Response:
    page = render(request.app.openapi(), str(request.scope.get("root_path", "")) + "/openapi.json")
    return Response(page, media_type="text/html", headers={"Content-Security-Policy": _POLICY})


def render(openapi: Mapping[str, Any], source: str) -> str:
    """The page of an OpenAPI description.

    Args:
        source: where the description itself can be had.
    """
    schemas: Mapping[str, Any] = openapi.get("components", {}).get("schemas", {})
    by_tag: dict[str, list[str]] = {}
    for path, methods in openapi.get("paths", {}).items():
        for method in _METHODS:
            if method in methods:
                operation = methods[method]
                tag = (operation.get("tags") or ["other"])[0]
                by_tag.setdefault(tag, []).append(_operation(method, path, operation, schemas))
    info = openapi.get("info", {})
    title = escape(f"{info.get('title', '')} {info.get('version', '')}".strip())
    groups = "".join(f"<h2>{escape(tag)}</h2>{''.join(parts)}" for tag, parts in by_tag.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>{title}</h1>'
        f"<p>{escape(info.get('description', ''))}</p>"
        f'<p>As OpenAPI: <a href="{escape(source)}">openapi.json</a></p>{groups}</body></html>'
    )


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    parts = [
        f'<article><h3><span class="method">{method.upper()}</span> <code>{escape(path)}</code></h3>',
        f"<p><b>{escape(operation.get('summary', ''))}</b></p>",
    ]
    if description := operation.get("description"):
        parts.append(f"<p>{escape(description)}</p>")
    if rows := "".join(_parameter(parameter) for parameter in operation.get("parameters", [])):
        parts.append(f"<table>{rows}</table>")
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        parts += _content(f"Body: {media}", content, schemas)
    for status, answer in operation.get("responses", {}).items():
        heading = f"{status}: {answer.get('description', '')}"
        contents = answer.get("content") or {"": {}}
        for media, content in contents.items():
            parts += _content(f"{heading} ({media})" if media else heading, content, schemas)
    return "".join(parts) + "</article>"


def _parameter(parameter: Mapping[str, Any]) -> str:
    required = "required" if parameter.get("required") else "optional"
    told = parameter.get("description", "")
    return (
        f"<tr><td><code>{escape(parameter['name'])}</code></td><td>{escape(parameter['in'])}, {required}</td>"
        f"<td>{escape(told)}</td></tr>"
    )


def _content(heading: str, content: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    """A heading that opens onto the example and the schema, where there is any."""
    schema = resolve(content.get("schema", {}), schemas)
    examples: list[Any] = [content["example"]] if "example" in content else []
    examples += [example.get("value") for example in content.get("examples", {}).values()]
    examples += [*schema.get("examples", ()), *([schema["example"]] if "example" in schema else ())]
    examples = [value for number, value in enumerate(examples) if value not in examples[:number]]
    texts = [_text(value) for value in (*examples, *([schema] if schema else ()))]
    if not texts:
        yield f"<p>{escape(heading)}</p>"
        return
    shown = "".join(f"<pre>{escape(text)}</pre>" for text in texts)
    yield f"<details><summary>{escape(heading)}</summary>{shown}</details>"


def _text(value: Any) -> str:
    """JSON with a row of numbers on one line."""
    return _ROW.sub(
        lambda row: "[" + " ".join(row[1].split()) + "]", json.dumps(value, indent=2, ensure_ascii=False)
    )


def resolve(schema: Any, schemas: Mapping[str, Any], within: tuple[str, ...] = ()) -> Any:
    """A schema with its references filled in; one that leads back to itself stays a reference."""
    if isinstance(schema, list):
        return [resolve(part, schemas, within) for part in schema]
    if not isinstance(schema, dict):
        return schema
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    if name in schemas and name not in within:
        return resolve(schemas[name], schemas, (*within, name))
    return {key: resolve(value, schemas, within) for key, value in schema.items()}
