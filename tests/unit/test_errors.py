"""The table from error to wire is total, stable and holds no error twice."""

from __future__ import annotations

import re

from vernier.api.http.errors import INTERNAL_MESSAGE, describe_error, error_headers
from vernier.errors import (
    EngineError,
    Overloaded,
    QueueFull,
    RequestError,
    VernierError,
    WrongShape,
    all_errors,
)

GRPC = {
    "CANCELLED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL", "FAILED_PRECONDITION",
}  # fmt: skip

#: The published interface: changing a row here is a breaking change.
PUBLISHED = {
    "invalid_request": 400, "invalid_json": 400, "unknown_input": 400, "missing_input": 400, "wrong_dtype": 400,
    "wrong_shape": 400, "non_finite_input": 400, "unknown_output": 400, "unsupported_precision": 400,
    "unauthorized": 401, "forbidden": 403, "unknown_model": 404, "unknown_version": 404, "request_timeout": 408,
    "load_refused": 409,
    "body_too_large": 413, "unsupported_media_type": 415, "queue_full": 429, "rate_limited": 429,
    "invalid_http": 400, "head_too_large": 431,
    "not_ready": 503, "engine_restarting": 503, "draining": 503, "overloaded": 503, "deadline_exceeded": 504,
}  # fmt: skip


def test_every_client_error_has_its_published_status_and_its_own_code() -> None:
    found = [(error.code, error.http_status) for error in all_errors(RequestError)]
    assert dict(found) == PUBLISHED
    assert len(found) == len(PUBLISHED)


def test_every_error_has_a_wire_form() -> None:
    for error in all_errors():
        assert re.fullmatch(r"[a-z_]+", error.code), error
        assert 400 <= error.http_status < 600, error
        assert error.grpc_status in GRPC, error


def test_what_is_not_the_clients_is_answered_without_details() -> None:
    for error in (EngineError("secret path /x"), VernierError("secret"), ValueError("secret")):
        assert describe_error(error) == (500, INTERNAL_MESSAGE, "internal")
    assert describe_error(WrongShape("send 2")) == (400, "send 2", "wrong_shape")


def test_retry_after_is_whole_seconds_and_never_zero() -> None:
    assert error_headers(QueueFull("full", 0.01)) == {"retry-after": "1"}
    assert error_headers(QueueFull("full", 2.1)) == {"retry-after": "3"}
    assert error_headers(Overloaded("full")) == {"retry-after": "1"}
    assert error_headers(WrongShape("x")) == {}
