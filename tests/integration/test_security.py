"""Keys, administration, TLS and mTLS on a real server."""

from __future__ import annotations

import json
import ssl
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.certificates import Authority
from tests.support.load import Load, settled
from tests.support.packages import mlp_model, run_reference, slow_model, write_package
from tests.support.server import Server, free_port, serve
from tests.support.wire import Wire
from vernier.api.auth.security import digest_of

BODY = {"model": "mlp", "inputs": {"x": [[1, 2, 3, 4]]}}
KEY, FEW, ADMIN = "front-ends-key", "few-at-once", "administrators-token"


@pytest.fixture
def guarded(engines: Path, tmp_path: Path) -> dict[str, str]:
    """Settings of a service with one key and an administration token."""
    write_package(engines)
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'[[key]]\nname = "front"\nsha256 = "{digest_of(KEY)}"\nrequests_per_s = 20\n'
        f'[[key]]\nname = "few"\nsha256 = "{digest_of(FEW)}"\nconcurrent = 2\n'
    )
    token = tmp_path / "token"
    token.write_text(ADMIN)
    return {"api_keys_file": str(keys), "admin_token_file": str(token)}


def test_predictions_need_the_key_and_probes_do_not(
    engines: Path, tmp_path: Path, guarded: dict[str, str]
) -> None:
    write_package(engines, "slow", model=slow_model(layers=10))
    with serve(engines, tmp_path / "log", **guarded) as server:
        url = server.url + "/v1/predict"
        refused = httpx.post(url, json=BODY)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert httpx.post(url, json=BODY, headers={"x-api-key": "wrong"}).status_code == 401
        answered = httpx.post(url, json=BODY, headers={"authorization": f"Bearer {KEY}"})
        assert answered.status_code == 200
        assert answered.headers["x-content-type-options"] == "nosniff"
        assert server.get("/v1/models").status_code == 401
        assert server.get("/metrics").status_code == 200
        with httpx.Client(headers={"x-api-key": KEY}) as client:
            responses = [client.post(url, json=BODY) for _ in range(100)]
        limited = [r for r in responses if r.status_code == 429]
        assert limited
        assert limited[0].json()["code"] == "rate_limited"
        assert int(limited[0].headers["retry-after"]) >= 1
        assert KEY not in server.log
        # two at once: of eight that come together most are refused at once, and afterwards there is room again
        load = Load(server, "slow", clients=8, headers={"x-api-key": FEW})
        load.wait_for(40)
        load.stop()
        assert set(load.statuses) == {200, 429}
        assert {body["code"] for body in load.bodies} == {"rate_limited"}
        assert httpx.post(url, json=BODY, headers={"x-api-key": FEW}).status_code == 200
        settled(server, "slow")


def test_only_the_administrator_loads_and_unloads(
    engines: Path, tmp_path: Path, guarded: dict[str, str]
) -> None:
    with serve(engines, tmp_path / "log", **guarded) as server:
        write_package(engines, "late")
        load = server.url + "/v2/repository/models/late/load"
        assert httpx.post(load).status_code == 401
        assert httpx.post(load, headers={"authorization": f"Bearer {KEY}"}).status_code == 401
        admin = {"authorization": f"Bearer {ADMIN}"}
        assert httpx.post(load, headers=admin).status_code == 200
        index = httpx.post(server.url + "/v2/repository/index", headers=admin).json()
        assert [m["name"] for m in index] == ["late", "mlp"]
        assert httpx.post(server.url + "/v2/repository/models/none/load", headers=admin).status_code == 404
        for name in ("late%00", "%2e%2e", "x" * 300, "late%0a"):
            for action in ("load", "unload"):
                refused = httpx.post(f"{server.url}/v2/repository/models/{name}/{action}", headers=admin)
                assert (refused.status_code, refused.json()["code"]) == (404, "unknown_model"), name
        for version in ("9" * 5000, "late", "%C2%B2"):
            refused = httpx.post(f"{load}?version={version}", headers=admin)
            assert (refused.status_code, refused.json()["code"]) == (400, "wrong_shape")
            assert len(refused.json()["error"]) < 250
        unload = server.url + "/v2/repository/models/late/unload"
        assert httpx.post(unload, headers=admin).status_code == 200
        assert server.metric("vernier_requests_admitted_total", model="late") == 0
        (engines / "late" / "1" / "fp32.onnx").write_bytes(b"x")
        refused = httpx.post(load, headers=admin)
        assert (refused.status_code, refused.json()["code"]) == (409, "load_refused")


def test_without_a_token_administration_is_off(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    with serve(engines, tmp_path / "log") as server:
        refused = httpx.post(server.url + "/v2/repository/models/mlp/unload")
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize("fronts", ["0", "1"])
def test_no_host_header_replaces_a_key_or_the_administration_token(
    fronts: str, engines: Path, tmp_path: Path, guarded: dict[str, str]
) -> None:
    body = json.dumps(BODY).encode()
    with serve(engines, tmp_path / "log", fronts=fronts, **guarded) as server:
        for host in ("x", "x/ping?", "x/docs#", "x/metrics?y="):
            for target in ("/v1/predict", "/v1/%70redict", "/v2/repository/models/mlp/unload", "/v1/models"):
                head = (
                    f"POST {target} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\n\r\n"
                )
                with Wire(server) as wire:
                    wire.send(head.encode() + body)
                    assert wire.reply().status == 401, (host, target)


def test_behind_a_proxy_with_a_prefix_the_same_paths_are_guarded(
    engines: Path, tmp_path: Path, guarded: dict[str, str]
) -> None:
    prefix = ("env", "UVICORN_ROOT_PATH=/ping")
    with serve(engines, tmp_path / "log", uvicorn=True, prefix=prefix, **guarded) as server:
        assert httpx.post(server.url + "/v1/predict", json=BODY).status_code == 401
        assert (
            httpx.post(server.url + "/v1/predict", json=BODY, headers={"x-api-key": KEY}).status_code == 200
        )
        assert httpx.post(server.url + "/v2/repository/models/mlp/unload").status_code == 401


def test_a_model_is_replaced_under_load_without_a_lost_request(
    engines: Path, tmp_path: Path, guarded: dict[str, str]
) -> None:
    guarded.pop("api_keys_file")
    write_package(engines, version=2, model=mlp_model(seed=4))
    x = np.ones((3, 4), np.float32)
    expected = {v: run_reference(mlp_model(seed=s), {"x": x})["y"] for v, s in (("1", 0), ("2", 4))}
    failures: list[str] = []
    stop = threading.Event()

    def client(server: Server) -> None:
        with httpx.Client(base_url=server.url, timeout=30) as session:
            while not stop.is_set():
                response = session.post("/v1/predict", json={"model": "mlp", "inputs": {"x": x.tolist()}})
                if response.status_code != 200:
                    failures.append(response.text)
                    continue
                answer = response.json()
                if not np.allclose(answer["outputs"]["y"], expected[answer["version"]], atol=1e-6):
                    failures.append(f"wrong answer of version {answer['version']}")

    with serve(engines, tmp_path / "log", **guarded) as server:
        threads = [threading.Thread(target=client, args=(server,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        admin = {"authorization": f"Bearer {ADMIN}"}
        for _ in range(5):
            for action in ("load?version=1", "load?version=2", "unload?version=2", "load?version=2"):
                response = httpx.post(
                    f"{server.url}/v2/repository/models/mlp/{action}", headers=admin, timeout=30
                )
                assert response.status_code == 200, response.text
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failures == []


def test_tls_and_clients_with_certificates(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    authority, stranger = Authority(tmp_path, "authority"), Authority(tmp_path, "stranger")
    own, client, foreign = authority.issue("server"), authority.issue("client"), stranger.issue("foreign")
    settings = {
        "tls_certificate_file": str(own.certificate),
        "tls_key_file": str(own.key),
        "tls_client_ca_file": str(authority.certificate),
        "metrics_port": str(free_port()),
    }

    def context(pair: object | None) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(authority.certificate))
        if pair is not None:
            made.load_cert_chain(pair.certificate, pair.key)  # type: ignore[attr-defined]
        return made

    with serve(engines, tmp_path / "log", health_port=int(settings["metrics_port"]), **settings) as server:
        url = f"https://127.0.0.1:{server.port}/v1/predict"
        assert httpx.post(url, json=BODY, verify=context(client)).status_code == 200
        for pair in (None, foreign):
            with pytest.raises(httpx.TransportError):
                httpx.post(url, json=BODY, verify=context(pair))
        with pytest.raises(httpx.TransportError):
            httpx.post(url.replace("https", "http"), json=BODY)
        assert "vernier_ready 1.0" in server.get("/metrics").text
        assert server.get("/v1/models").status_code == 404


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tls_key_file": "key.pem"}, "VERNIER_TLS_CERTIFICATE_FILE"),
        ({"tls_key_file": "absent", "tls_certificate_file": "absent"}, "not a file"),
        ({"api_keys_file": "absent"}, "cannot be read"),
        ({"jwt_public_key_file": "absent"}, "VERNIER_JWT_AUDIENCE"),
        ({"port": "x"}, "VERNIER_PORT"),
        ({"prot": "1"}, "VERNIER_PROT"),
    ],
)
def test_settings_that_cannot_work_stop_the_start_with_a_sentence(
    settings: dict[str, str], sentence: str, engines: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=sentence), serve(engines, tmp_path / "log", **settings):
        pass
    assert "Traceback" not in (tmp_path / "log").read_text()
