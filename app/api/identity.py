"""The id under which a request is found: in its answer, in the `x-request-id` header and in the log."""

from __future__ import annotations

from random import Random, SystemRandom
from urllib.parse import quote

#: Ids must differ, they need not be secret.
_bits = Random(SystemRandom().getrandbits(128)).getrandbits
_LONGEST = 128


def new_id() -> str:
    """16 hexadecimal digits."""
    return f"{_bits(64):016x}"


def header_value(identity: str) -> str:
    """The id as a header can carry it, whatever the client chose."""
    if len(identity) <= _LONGEST and identity.isascii() and identity.isprintable():
        return identity
    return quote(identity)[:_LONGEST]
