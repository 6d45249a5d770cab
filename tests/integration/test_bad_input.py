"""Each bad input gets its status, its code and a sentence, and nothing of it is lost from the counts."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from tests.support.server import Server

GOOD = [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{not json", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b'{"model": "mlp"}', 400, "missing_input"),
        (b'{"model": "mlp", "inputs": {}}', 400, "missing_input"),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3,4]], "w": [[1]]}}', 400, "unknown_input"),
        (b'{"model": "mlp", "inputs": {"x": [1,2,3,4]}}', 400, "wrong_shape"),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3]]}}', 400, "wrong_shape"),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3,4],[1]]}}', 400, "wrong_shape"),
        (b'{"model": "mlp", "inputs": {"x": []}}', 400, "wrong_shape"),
        (b'{"model": "mlp", "inputs": {"x": [["1","2","3","4"]]}}', 400, "wrong_dtype"),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3,null]]}}', 400, "wrong_dtype"),
        (b'{"model": "mlp", "inputs": {"x": [[true,2,3,4]]}}', 400, "wrong_dtype"),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3,1e39]]}}', 400, "non_finite_input"),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3,NaN]]}}', 400, "non_finite_input"),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3,4]]}, "outputs": ["q"]}', 400, "unknown_output"),
        (
            b'{"model": "mlp", "inputs": {"x": [[1,2,3,4]]}, "precision": "int8"}',
            400,
            "unsupported_precision",
        ),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3,4]]}, "timeout_ms": 0}', 504, "deadline_exceeded"),
        (b'{"model": "none", "inputs": {"x": [[1,2,3,4]]}}', 404, "unknown_model"),
        (b'{"inputs": {"x": [[1,2,3,4]]}}', 404, "unknown_model"),
        (b'{"model": "mlp", "version": "9", "inputs": {"x": [[1,2,3,4]]}}', 404, "unknown_version"),
        (
            b'{"model": "mlp", "version": "%s", "inputs": {"x": [[1,2,3,4]]}}' % (b"1" * 5000),
            404,
            "unknown_version",
        ),
        (
            b'{"model": "mlp", "version": %s, "inputs": {"x": [[1,2,3,4]]}}' % (b"1" * 5000),
            400,
            "invalid_json",
        ),
        (b'{"model": "%s", "inputs": {"x": [[1,2,3,4]]}}' % (b"m" * 5000), 404, "unknown_model"),
        (b'{"model": "mlp", "inputs": {"x": [[1,2,3,4]]}}' + b" " * 200_000, 413, "body_too_large"),
    ],
)
def test_the_status_and_the_code_are_those_of_the_interface(
    mlp_server: Server, body: bytes, status: int, code: str
) -> None:
    response = httpx.post(
        mlp_server.url + "/v1/predict", content=body, headers={"content-type": "application/json"}
    )
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.json().keys() == {"error", "code"}
    assert 20 < len(response.json()["error"]) < 500
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("digits", ["1" * 5000, "0" * 5000 + "1"])
def test_a_version_of_thousands_of_digits_is_an_unknown_one(mlp_server: Server, digits: str) -> None:
    described = mlp_server.get(f"/v1/models/mlp?version={digits}")
    assert (described.status_code, described.json()["code"]) == (404, "unknown_version")
    raw = httpx.post(
        f"{mlp_server.url}/v1/predict?model=mlp&version={digits}",
        content=b"\0" * 16,
        headers={"content-type": "application/octet-stream"},
    )
    assert (raw.status_code, raw.json()["code"]) == (404, "unknown_version")


@pytest.mark.parametrize("field", ["priority", "timeout_ms"])
def test_a_number_of_thousands_of_digits_in_the_query_is_refused(mlp_server: Server, field: str) -> None:
    response = httpx.post(
        f"{mlp_server.url}/v1/predict?model=mlp&{field}={'1' * 5000}",
        content=b"\0" * 16,
        headers={"content-type": "application/octet-stream"},
    )
    assert (response.status_code, response.json()["code"]) == (400, "invalid_json")


def test_other_media_types_are_refused(mlp_server: Server) -> None:
    response = httpx.post(
        mlp_server.url + "/v1/predict", content=b"<x/>", headers={"content-type": "text/xml"}
    )
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_unknown_routes_and_methods_answer_in_the_same_form(mlp_server: Server) -> None:
    assert mlp_server.get("/nothing").json()["code"] == "not_found"
    assert mlp_server.get("/v1/predict").json()["code"] == "method_not_allowed"


def test_an_announced_body_over_the_limit_is_refused_before_it_is_sent(mlp_server: Server) -> None:
    with socket.create_connection(("127.0.0.1", mlp_server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000000000\r\n\r\n{"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_over_the_limit_is_refused_before_it_is_read_whole(mlp_server: Server) -> None:
    sent = 0

    def chunks() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 100_000
            yield b" " * 100_000

    try:
        response = httpx.post(mlp_server.url + "/v1/predict", content=chunks(), timeout=10)
        assert response.status_code == 413
    except httpx.TransportError:
        pass  # the connection was closed while we were still sending, which is a refusal too
    assert sent < 100_000_000


def test_refusals_are_counted_by_code(mlp_server: Server) -> None:
    before = mlp_server.metric("vernier_requests_total", code="wrong_shape", model="mlp")
    mlp_server.predict({"x": [[1.0]]}, model="mlp")
    assert mlp_server.metric("vernier_requests_total", code="wrong_shape", model="mlp") == before + 1


def test_a_client_that_disconnects_leaves_nothing_behind(mlp_server: Server) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", mlp_server.port), timeout=10) as connection:
            body = b'{"model": "mlp", "inputs": {"x": [[1,2,3,4]]}}'
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
    assert mlp_server.predict({"x": GOOD}, model="mlp").status_code == 200
    settled(mlp_server)


def settled(server: Server) -> None:
    """The invariant that holds once nothing is in flight."""
    for labels, admitted in server.metrics()["vernier_requests_admitted_total"]:
        ended = server.metric("vernier_requests_ended_total", **labels)
        inflight = server.metric("vernier_inflight_requests", **labels)
        assert (admitted, inflight) == (ended, 0), labels
