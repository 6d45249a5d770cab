"""Reading the secrets of `vernier.api.auth.security` from files.

[[key]]
name = "front-end"
sha256 = "9f86d0…"          # of the key; `python -m vernier.keys front-end` prints both
requests_per_s = 200        # optional
concurrent = 64             # optional
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vernier.api.auth.security import Guard, JwtRules, Key, LimitCounts, OwnCounts, digest_of
from vernier.settings import Settings, SettingsError

_HEX = re.compile(r"[0-9a-f]{64}")


class _KeyEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_s: int | None = Field(None, ge=1)
    concurrent: int | None = Field(None, ge=1)


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: list[_KeyEntry] = Field(min_length=1)


def _text(path: Path, setting: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{setting} names {path}, which cannot be read: {error}") from error


def read_keys(path: Path) -> tuple[Key, ...]:
    """Raises SettingsError with the first fault of the file."""
    try:
        entries = _KeyFile.model_validate(tomllib.loads(_text(path, "VERNIER_API_KEYS_FILE"))).key
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"{path}: {where}: {first['msg']}") from error
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise SettingsError(f"{path} names a key twice; give every key a name of its own")
    return tuple(Key(e.name, e.sha256, e.requests_per_s, e.concurrent) for e in entries)


def read_admin_digest(path: Path) -> str:
    """The file holds the token's SHA-256 in hex, or the token itself (as secret stores mount it)."""
    text = _text(path, "VERNIER_ADMIN_TOKEN_FILE").strip()
    if len(text) < 16:
        raise SettingsError(
            f"{path} holds no token of at least 16 characters; `python -m vernier.keys admin` makes one"
        )
    return text if _HEX.fullmatch(text) else digest_of(text)


def make_guard(settings: Settings, counts: LimitCounts | None = None) -> Guard:
    """Raises SettingsError.

    Args:
        counts: shared by all fronts; None for a service of one process.
    """
    rules = None
    if settings.jwt_public_key_file is not None:
        if settings.jwt_audience is None:
            raise SettingsError(
                "VERNIER_JWT_PUBLIC_KEY_FILE needs VERNIER_JWT_AUDIENCE: tokens for others are refused"
            )
        rules = JwtRules(
            _text(settings.jwt_public_key_file, "VERNIER_JWT_PUBLIC_KEY_FILE"),
            ("RS256", "ES256", "EdDSA"),
            settings.jwt_audience,
            settings.jwt_issuer,
        )
    return Guard(
        keys=read_keys(settings.api_keys_file) if settings.api_keys_file else (),
        jwt_rules=rules,
        admin_digest=read_admin_digest(settings.admin_token_file) if settings.admin_token_file else None,
        counts=OwnCounts() if counts is None else counts,
    )
