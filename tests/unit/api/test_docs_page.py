"""The page at /docs: everything of the description, and nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from vernier.api.docs_page import render, resolve


class Reader(HTMLParser):
    """Collects what a browser would fetch or run, and checks that elements are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "action") or name.startswith("on")
        ]
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


DESCRIPTION = {
    "info": {"title": "<b>", "version": "1", "description": "a & b"},
    "components": {
        "schemas": {
            "Tree": {"properties": {"children": {"items": {"$ref": "#/components/schemas/Tree"}}}},
        }
    },
    "paths": {
        "/x/{name}": {
            "post": {
                "summary": "<script>alert(1)</script>",
                "parameters": [{"name": "name", "in": "path", "required": True}],
                "requestBody": {
                    "content": {
                        "application/json": {
                            "schema": {"$ref": "#/components/schemas/Tree"},
                            "example": {"children": []},
                        }
                    }
                },
                "responses": {"204": {"description": "Gone"}},
            }
        }
    },
}


def test_it_shows_routes_parameters_bodies_and_answers_and_escapes_all_of_them() -> None:
    read = Reader(render(DESCRIPTION, "/openapi.json"))
    assert not read.fetched
    for part in (
        "POST",
        "/x/{name}",
        "<script>alert(1)</script>",
        "path, required",
        '"children": []',
        "204: Gone",
    ):
        assert part in read.text
    assert not re.search(r"https?:", read.text)


def test_a_schema_that_holds_itself_ends() -> None:
    schemas = DESCRIPTION["components"]["schemas"]  # type: ignore[index]
    assert resolve({"$ref": "#/components/schemas/Tree"}, schemas) == schemas["Tree"]
