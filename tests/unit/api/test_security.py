"""Keys, tokens, limits and administration."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vernier.api.auth import security
from vernier.api.auth.keyfile import read_admin_digest, read_keys
from vernier.api.auth.security import Guard, JwtRules, Key, digest_of, token_of
from vernier.errors import Forbidden, RateLimited, Unauthorized
from vernier.settings import SettingsError

PRIVATE = ec.generate_private_key(ec.SECP256R1())
PUBLIC = PRIVATE.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
RULES = JwtRules(PUBLIC.decode(), ("ES256",), "vernier", "issuer")


def guard(**limits: int) -> Guard:
    return Guard(keys=[Key("other", digest_of("other")), Key("front", digest_of("secret"), **limits)])


def test_without_keys_everybody_may_predict_and_nobody_may_administrate() -> None:
    Guard().admit(None).release()
    with pytest.raises(Forbidden):
        Guard().admit_admin("anything")


@pytest.mark.parametrize("token", [None, "", "wrong", "secret ", "SECRET", digest_of("secret")])
def test_only_the_key_itself_opens(token: str | None) -> None:
    with pytest.raises(Unauthorized):
        guard().admit(token)


def test_a_key_is_read_from_either_header() -> None:
    assert token_of("Bearer secret", None) == "secret"
    assert token_of("bearer  secret", None) == "secret"
    assert token_of(None, "secret") == "secret"
    assert token_of("Basic c2VjcmV0", None) is None
    guard().admit("secret").release()


def test_requests_at_once_are_limited_and_ended_ones_make_room() -> None:
    limited = guard(concurrent=2)
    first = limited.admit("secret")
    limited.admit("secret")
    with pytest.raises(RateLimited, match="2 requests at once"):
        limited.admit("secret")
    limited.admit("other")
    first.release()
    first.release()
    limited.admit("secret")
    with pytest.raises(RateLimited):
        limited.admit("secret")


def test_requests_per_second_are_limited_for_each_key() -> None:
    now = 100.0
    limited = guard(requests_per_s=5)
    limited.clock = lambda: now
    for start in (100.0, 101.0, 200.0):
        for step in range(5):
            now = start + 0.1 * step
            limited.admit("secret").release()
        now = start + 0.99
        with pytest.raises(RateLimited, match="5 requests in a second"):
            limited.admit("secret")
    limited.admit("other").release()


def test_a_request_that_is_refused_for_one_limit_spends_nothing_of_the_other() -> None:
    now = 100.0
    limited = guard(requests_per_s=3, concurrent=1)
    limited.clock = lambda: now
    first = limited.admit("secret")
    for _ in range(10):
        with pytest.raises(RateLimited, match="at once"):
            limited.admit("secret")
    first.release()
    limited.admit("secret").release()
    limited.admit("secret").release()
    for _ in range(10):
        with pytest.raises(RateLimited, match="in a second"):
            limited.admit("secret")
    now = 101.0
    limited.admit("secret").release()


def token(**claims: object) -> str:
    whole = {"sub": "alice", "aud": "vernier", "iss": "issuer", "exp": time.time() + 60, **claims}
    return jwt.encode({k: v for k, v in whole.items() if v is not None}, PRIVATE, "ES256")


def test_a_token_of_the_issuer_opens() -> None:
    Guard(jwt_rules=RULES).admit(token()).release()


@pytest.mark.parametrize(
    "claims", [{"aud": "other"}, {"iss": "other"}, {"exp": 1}, {"exp": None}, {"sub": None}, {"aud": None}]
)
def test_tokens_for_others_and_old_ones_are_refused(claims: dict[str, object]) -> None:
    with pytest.raises(Unauthorized):
        Guard(jwt_rules=RULES).admit(token(**claims))


def test_a_token_is_verified_once_and_holds_until_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[str] = []

    def decode(token: str, *args: Any, **options: Any) -> Any:
        verified.append(token)
        return real(token, *args, **options)

    real = jwt.decode
    monkeypatch.setattr(jwt, "decode", decode)
    guard = Guard(jwt_rules=RULES)
    expires = int(time.time()) + 2
    short, long = token(exp=expires), token()
    for _ in range(3):
        guard.admit(short).release()
        guard.admit(long).release()
    assert verified == [short, long]
    time.sleep(max(0.0, expires + 0.1 - time.time()))
    for _ in range(2):
        with pytest.raises(Unauthorized):
            guard.admit(short)
    guard.admit(long).release()
    assert verified == [short, long, short, short]


def test_the_number_of_verified_tokens_that_are_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_MOST_VERIFIED", 3)
    guard = Guard(jwt_rules=RULES)
    for n in range(10):
        guard.admit(token(sub=str(n))).release()
        assert len(guard._verified) <= 3


def test_unsigned_and_foreign_tokens_are_refused() -> None:
    claims = {"sub": "a", "aud": "vernier", "iss": "issuer", "exp": time.time() + 60}
    stranger = ec.generate_private_key(ec.SECP256R1())
    for forged in (jwt.encode(claims, "", "none"), jwt.encode(claims, stranger, "ES256")):
        with pytest.raises(Unauthorized):
            Guard(jwt_rules=RULES).admit(forged)


def test_the_administration_token_may_lie_hashed_or_plain(tmp_path: Path) -> None:
    secret = "a-long-enough-token"
    for text in (secret, secret + "\n", digest_of(secret)):
        path = tmp_path / "token"
        path.write_text(text)
        administered = Guard(admin_digest=read_admin_digest(path))
        administered.admit_admin(secret)
        with pytest.raises(Unauthorized):
            administered.admit_admin("another")
    path.write_text("short")
    with pytest.raises(SettingsError):
        read_admin_digest(path)


def test_a_key_file_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    entry = f'[[key]]\nname = "a"\nsha256 = "{digest_of("x")}"\nconcurrent = 3\n'
    path.write_text(entry)
    assert read_keys(path) == (Key("a", digest_of("x"), None, 3),)
    for text, fault in [
        ("[[key]\n", "TOML"),
        ('[[key]]\nname = "a"\nsha256 = "plain"\n', "sha256"),
        (entry + "burst = 1\n", "burst"),
        (entry + entry, "twice"),
        ("", "key"),
    ]:
        path.write_text(text)
        with pytest.raises(SettingsError, match=fault):
            read_keys(path)
    with pytest.raises(SettingsError, match="absent"):
        read_keys(tmp_path / "absent")
