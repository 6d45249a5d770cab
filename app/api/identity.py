"""The id under which a request is found: in its answer, in the `x-request-id` header and in the log."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import quote

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


def header_values(identities: Sequence[str]) -> list[bytes]:
    """`header_value` of each, as bytes: looked at together, since nearly all are plain."""
    together = "".join(identities)
    if together.isascii() and together.isprintable() and len(max(identities, key=len)) <= _LONGEST:
        return list(map(str.encode, identities))
    return [header_value(identity).encode() for identity in identities]


def header_value(identity: str) -> str:
    """The id as a header can carry it, whatever the client chose."""
    if len(identity) <= _LONGEST and identity.isascii() and identity.isprintable():
        return identity
    return quote(identity)[:_LONGEST]
