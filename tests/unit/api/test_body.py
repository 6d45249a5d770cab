"""A body that is announced in a way that no server in front has looked at."""

from __future__ import annotations

import pytest
from starlette.requests import Request
from starlette.types import Message

from vernier.api.http.body import read_body
from vernier.errors import BodyTooLarge, InvalidJson, RequestError


@pytest.mark.parametrize(
    ("announced", "refusal"),
    [
        (b"1" * 5000, BodyTooLarge),
        (b"101", BodyTooLarge),
        (b"\xb2", InvalidJson),  # a superscript two: a digit to str.isdigit(), none to int()
        (b"-1", InvalidJson),
        (b"", InvalidJson),
    ],
)
async def test_an_announced_length_that_cannot_be_is_refused(
    announced: bytes, refusal: type[RequestError]
) -> None:
    async def receive() -> Message:
        raise AssertionError("nothing of the body may be read")

    request = Request({"type": "http", "headers": [(b"content-length", announced)]}, receive)
    with pytest.raises(refusal):
        await read_body(request, limit_bytes=100, timeout_s=1.0)
