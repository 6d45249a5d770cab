"""Precision on live traffic: what strays falls back without a failed request, what is not finite never leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.packages import mlp_model, write_package
from tests.support.server import Server, serve

INSIDE = np.full((1, 4), 0.5, np.float32)
OUTSIDE = np.full((1, 4), 5.0, np.float32)


def ask(server: Server, x: np.ndarray, **fields: str) -> tuple[str, np.ndarray]:
    response = server.predict({"x": x.tolist()}, **fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["precision"], np.array(answer["outputs"]["z"], np.float32)


def wait_for_precision(server: Server, precision: str, x: np.ndarray) -> int:
    """Requests until new batches take `precision`."""
    limit = time.monotonic() + 30
    for n in range(10_000):
        if ask(server, x)[0] == precision:
            return n
        assert time.monotonic() < limit, server.log
        time.sleep(0.005)
    raise AssertionError


def test_a_variant_that_strays_on_live_traffic_falls_back(engines: Path, tmp_path: Path) -> None:
    write_package(engines, variants={"int8": mlp_model(bend="clip")})
    with serve(engines, tmp_path / "log", precision="int8", monitor_share="1") as server:
        assert ask(server, INSIDE)[0] == "int8"
        assert wait_for_precision(server, "fp32", OUTSIDE) < 500
        np.testing.assert_allclose(ask(server, OUTSIDE)[1], 2 * OUTSIDE)
        assert (
            server.metric(
                "vernier_precision_fallbacks_total", reason="budget", **{"from": "int8", "to": "fp32"}
            )
            == 1
        )
        assert server.metric("vernier_precision_active", precision="fp32") == 1
        assert server.metric("vernier_precision_active", precision="int8") == 0
        assert server.metric("vernier_precision_samples_total", result="over") >= 4
        assert server.metric("vernier_precision_error_count", metric="rel_l2") >= 4
        assert server.get("/v1/models").json()["models"][0]["precision"] == "fp32"
        messages = [json.loads(line)["message"] for line in server.log.splitlines()]
        assert "precision fallback" in messages


def test_a_suspended_variant_comes_back_after_sustained_evidence(engines: Path, tmp_path: Path) -> None:
    write_package(engines, variants={"int8": mlp_model(bend="clip")})
    settings = {"precision": "int8", "monitor_share": "1", "monitor_cool_down_s": "0.2"}
    with serve(engines, tmp_path / "log", **settings) as server:
        wait_for_precision(server, "fp32", OUTSIDE)
        assert wait_for_precision(server, "int8", INSIDE) >= 50
        assert server.metric("vernier_precision_fallbacks_total", reason="recovered") == 1


def test_a_sound_variant_keeps_serving(engines: Path, tmp_path: Path) -> None:
    write_package(engines, variants={"int8": mlp_model()})
    with serve(engines, tmp_path / "log", precision="int8", monitor_share="1") as server:
        for _ in range(200):
            assert ask(server, OUTSIDE)[0] == "int8"
        assert server.metric("vernier_precision_fallbacks_total") == 0
        assert server.metric("vernier_precision_samples_total", result="within") > 0
        assert server.metric("vernier_precision_samples_total", result="over") == 0


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_non_finite_output_is_never_returned(engines: Path, tmp_path: Path, rows: int) -> None:
    write_package(engines, variants={"fp16": mlp_model(bend="overflow")})
    x = np.tile(OUTSIDE, (rows, 1))
    with serve(engines, tmp_path / "log", precision="fp16", monitor_share="0") as server:
        assert ask(server, INSIDE)[0] == "fp16"
        precision, z = ask(server, x)
        assert precision == "fp32"
        np.testing.assert_allclose(z, 2 * x)
        assert server.metric("vernier_nonfinite_outputs_total", precision="fp16") >= 1
        assert ask(server, INSIDE)[0] == "fp16"


def test_a_request_may_demand_a_precision(engines: Path, tmp_path: Path) -> None:
    write_package(engines, variants={"int8": mlp_model(bend="clip")})
    with serve(engines, tmp_path / "log", precision="int8", monitor_share="0") as server:
        assert ask(server, OUTSIDE, precision="fp32")[0] == "fp32"
        np.testing.assert_allclose(ask(server, OUTSIDE, precision="fp32")[1], 2 * OUTSIDE)
        assert ask(server, OUTSIDE, precision="int8")[0] == "int8"


def test_a_variant_that_fails_its_self_test_is_not_served(engines: Path, tmp_path: Path) -> None:
    write_package(engines, variants={"int8": mlp_model(seed=9)})
    with serve(engines, tmp_path / "log", precision="int8") as server:
        assert ask(server, INSIDE)[0] == "fp32"
        assert (
            server.predict({"x": INSIDE.tolist()}, precision="int8").json()["code"] == "unsupported_precision"
        )
        assert '"variant refused"' in server.log
