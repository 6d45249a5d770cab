"""Who may ask what, and how much: API keys or JWTs for predictions, one token for administration.

Keys are random, so their SHA-256 is all that is kept; `python -m vernier.keys` makes one. Tokens are looked up by it
too: even who learned a whole digest from how long that takes would not have the key. Nothing here reads files;
`vernier.api.auth.keyfile` does.
"""

from __future__ import annotations

import hmac
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol

import jwt

from vernier.errors import Forbidden, RateLimited, Unauthorized

_BEARER = "bearer "
#: Tokens whose signature need not be verified again.
_MOST_VERIFIED = 4096


@dataclass(frozen=True)
class Key:
    """A client. `digest` is the SHA-256 of its key in hex; None stands for no limit."""

    name: str
    digest: str
    requests_per_s: int | None = None
    concurrent: int | None = None


@dataclass(frozen=True)
class JwtRules:
    """How tokens are verified: the issuer's public key in PEM, and what `aud` and `iss` must be."""

    public_key: str
    algorithms: Sequence[str]
    audience: str
    issuer: str | None = None


def digest_of(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def token_of(authorization: str | None, api_key: str | None) -> str | None:
    """The token of `Authorization: Bearer …` or `X-Api-Key: …`."""
    if authorization is not None and authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    return api_key


@dataclass(slots=True)
class Permit:
    """Leave to run one request; `release` when it has ended."""

    _on_release: Callable[[], None] | None = None

    def release(self) -> None:
        """Idempotent."""
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()


class LimitCounts(Protocol):
    """What clients use of their limits. Belongs to the event loop's thread."""

    def running(self, client: str) -> int:
        """Requests that run now."""

    def begin(self, client: str) -> None: ...

    def end(self, client: str) -> None: ...

    def spend(self, client: str, limit: int, now: float) -> bool:
        """Counts a request, unless as many as the limit were counted within the last second."""


class OwnCounts:
    """Of this process alone."""

    def __init__(self) -> None:
        self._running: dict[str, int] = {}
        self._sent: dict[str, deque[float]] = {}

    def running(self, client: str) -> int:
        return self._running.get(client, 0)

    def begin(self, client: str) -> None:
        self._running[client] = self.running(client) + 1

    def end(self, client: str) -> None:
        self._running[client] -= 1

    def spend(self, client: str, limit: int, now: float) -> bool:
        """A moving window: of the last `limit` counted requests, the first is a second ago or more."""
        sent = self._sent.setdefault(client, deque(maxlen=limit))
        if len(sent) == limit and now - sent[0] < 1.0:
            return False
        sent.append(now)  # the oldest one leaves
        return True


@dataclass
class Guard:
    """Belongs to the event loop's thread.

    Attributes:
        keys, jwt_rules: who may predict; with neither, everybody may.
        admin_digest: SHA-256 of the administration token in hex; None forbids administration.
        clock: monotonic, in seconds. Libraries for rate limits read the wall clock, and when that is set back
            an hour, a client at its limit would be locked out for an hour.
        counts: what clients use of their limits, in this process or in all fronts.
    """

    keys: Sequence[Key] = ()
    jwt_rules: JwtRules | None = None
    admin_digest: str | None = None
    clock: Callable[[], float] = time.monotonic
    counts: LimitCounts = field(default_factory=lambda: OwnCounts())
    _by_digest: dict[str, Key] = field(init=False)
    _verified: dict[str, tuple[Key, int]] = field(default_factory=dict)  # by the token's digest

    def __post_init__(self) -> None:
        self._by_digest = {key.digest: key for key in self.keys}

    @property
    def open(self) -> bool:
        """True when predictions need no token."""
        return not self.keys and self.jwt_rules is None

    def admit(self, token: str | None) -> Permit:
        """Leave to predict. Raises Unauthorized, RateLimited."""
        if self.open:
            return Permit()
        if token is None:
            raise Unauthorized("send an API key as 'Authorization: Bearer <key>' or 'X-Api-Key: <key>'")
        key = self._key_of(token)
        if key is None:
            raise Unauthorized("this key or token is not valid here; ask the service's operator for one")
        counts, name = self.counts, key.name
        if key.concurrent is not None and (running := counts.running(name)) >= key.concurrent:
            raise RateLimited(
                f"'{name}' runs {running} requests at once already, its limit; wait for one to end", 1.0
            )
        # last, so that a request that is refused uses up none of the rate
        if key.requests_per_s is not None and not counts.spend(name, key.requests_per_s, self.clock()):
            raise RateLimited(
                f"'{name}' sent more than {key.requests_per_s} requests in a second, its limit; slow down",
                1.0,
            )
        if key.concurrent is None:
            return Permit()
        counts.begin(name)
        return Permit(lambda: counts.end(name))

    def admit_admin(self, token: str | None) -> None:
        """Raises Forbidden when administration is off, Unauthorized when the token is not the one."""
        if self.admin_digest is None:
            raise Forbidden("administration is off; set VERNIER_ADMIN_TOKEN_FILE on the service to allow it")
        if token is None or not hmac.compare_digest(digest_of(token), self.admin_digest):
            raise Unauthorized("send the administration token as 'Authorization: Bearer <token>'")

    def _key_of(self, token: str) -> Key | None:
        digest = digest_of(token)
        key = self._by_digest.get(digest)
        if key is None and self.jwt_rules is not None:
            key = self._of_jwt(token, digest, self.jwt_rules)
        return key

    def _of_jwt(self, token: str, digest: str, rules: JwtRules) -> Key | None:
        """Verifying a signature takes ten times as long as a small prediction, and a client sends its token often."""
        known = self._verified.get(digest)
        if known is not None and time.time() < known[1]:  # `exp` is in Unix time (RFC 7519)
            return known[0]
        self._verified.pop(digest, None)
        found = _verify(token, rules)
        if found is None:
            return None
        if len(self._verified) >= _MOST_VERIFIED:
            self._verified.clear()
        self._verified[digest] = found
        return found[0]


def _verify(token: str, rules: JwtRules) -> tuple[Key, int] | None:
    """The client, and until when its token holds, in Unix time; None when it does not."""
    try:
        claims = jwt.decode(
            token,
            rules.public_key,
            algorithms=list(rules.algorithms),
            audience=rules.audience,
            issuer=rules.issuer,
            options={"require": ["exp", "aud", "sub"]},
        )
    except jwt.PyJWTError:
        return None
    return Key(name=f"jwt:{claims['sub']}", digest=""), int(claims["exp"])
