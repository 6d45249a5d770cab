"""The id under which a request is found: in its answer, in the `x-request-id` header and in the log."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import quote

import orjson

_LONGEST = 128
_BYTES = 8
_AT_ONCE = 256

#: Ids to give out. Made in hundreds, since asking the system for each costs more than the rest of the id.
_made: list[str] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_made.clear)


def new_id() -> str:
    """16 hexadecimal digits."""
    if not _made:
        _make()
    return _made.pop()


def new_ids(count: int) -> list[str]:
    """As many of them, in one step."""
    while len(_made) < count:
        _make()
    taken = _made[-count:]
    del _made[-count:]
    return taken


def _make() -> None:
    digits = os.urandom(_BYTES * _AT_ONCE).hex()
    _made.extend([digits[i : i + 2 * _BYTES] for i in range(0, len(digits), 2 * _BYTES)])


class Identities:
    """Ids of several requests as they are written; looked at together, since nearly all are plain.

    Attributes:
        texts: as they are.
        headers: as a header carries each; see `header_value`.
        json: as each stands between the quotes of a JSON text.
    """

    __slots__ = ("headers", "json", "texts")

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        if are_plain("".join(texts)) and len(max(texts, key=len)) <= _LONGEST:
            self.headers = self.json = list(map(str.encode, texts))
        else:
            self.headers = [header_value(text).encode() for text in texts]
            self.json = [orjson.dumps(text)[1:-1] for text in texts]


def are_plain(ids: str) -> bool:
    """Whether ids, written one behind the other, stand in a header and in a JSON text as they are."""
    return ids.isascii() and ids.isprintable() and '"' not in ids and "\\" not in ids


def header_value(identity: str) -> str:
    """The id as a header can carry it, whatever the client chose."""
    if len(identity) <= _LONGEST and identity.isascii() and identity.isprintable():
        return identity
    return quote(identity)[:_LONGEST]
