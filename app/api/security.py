"""Who may ask what, and how much: API keys or JWTs for predictions, one token for administration.

Keys are random, so their SHA-256 is all that is kept; `python -m app.keys` makes one. Every comparison
takes the same time whatever the token. Nothing here reads files; `app.api.keyfile` does.
"""

from __future__ import annotations

import hmac
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import jwt

from app.errors import Forbidden, RateLimited, Unauthorized

_BEARER = "bearer "


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


@dataclass
class Guard:
    """Belongs to the event loop's thread.

    Attributes:
        keys, jwt_rules: who may predict; with neither, everybody may.
        admin_digest: SHA-256 of the administration token in hex; None forbids administration.
        clock: monotonic, in seconds. Libraries for rate limits read the wall clock, and when that is set back
            an hour, a client at its limit would be locked out for an hour.
    """

    keys: Sequence[Key] = ()
    jwt_rules: JwtRules | None = None
    admin_digest: str | None = None
    clock: Callable[[], float] = time.monotonic
    _running: dict[str, int] = field(default_factory=dict)
    _sent: dict[str, deque[float]] = field(default_factory=dict)

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
        self._spend(key)
        if key.concurrent is None:
            return Permit()
        running = self._running.get(key.name, 0)
        if running >= key.concurrent:
            raise RateLimited(
                f"'{key.name}' runs {running} requests at once already, its limit; wait for one to end", 1.0
            )
        self._running[key.name] = running + 1
        return Permit(lambda: self._ended(key.name))

    def admit_admin(self, token: str | None) -> None:
        """Raises Forbidden when administration is off, Unauthorized when the token is not the one."""
        if self.admin_digest is None:
            raise Forbidden("administration is off; set VERNIER_ADMIN_TOKEN_FILE on the service to allow it")
        if token is None or not hmac.compare_digest(digest_of(token), self.admin_digest):
            raise Unauthorized("send the administration token as 'Authorization: Bearer <token>'")

    def _ended(self, name: str) -> None:
        self._running[name] -= 1

    def _spend(self, key: Key) -> None:
        """A moving window: of the last `requests_per_s` admitted requests, the first is a second ago or more."""
        if key.requests_per_s is None:
            return
        now = self.clock()
        sent = self._sent.setdefault(key.name, deque(maxlen=key.requests_per_s))
        if len(sent) == key.requests_per_s and now - sent[0] < 1.0:
            raise RateLimited(
                f"'{key.name}' sent more than {key.requests_per_s} requests in a second, its limit; slow down",
                1.0,
            )
        sent.append(now)  # the oldest one leaves

    def _key_of(self, token: str) -> Key | None:
        digest = digest_of(token)
        found = None
        for key in self.keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None and self.jwt_rules is not None:
            found = _from_jwt(token, self.jwt_rules)
        return found


def _from_jwt(token: str, rules: JwtRules) -> Key | None:
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
    return Key(name=f"jwt:{claims['sub']}", digest="")
