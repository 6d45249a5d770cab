"""Damaged, tampered and missing packages: that package is refused, the others are served, and it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.packages import mlp_model, write_package
from tests.support.server import serve


def test_an_empty_engines_folder_starts_not_ready_and_says_why(engines: Path, tmp_path: Path) -> None:
    with serve(engines, tmp_path / "log", ready=False) as server:
        response = server.wait_until("/v2/health/ready", 503)
        assert "no engine package" in server.wait_until("/v2/health/ready", 503).json()["error"]
        assert response.json()["code"] == "not_ready"
        refused = server.predict({"x": [[1, 2, 3, 4]]})
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
        assert server.get("/v1/models").json() == {"models": []}
        assert server.metric("vernier_ready") == 0


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_with_link(path: Path) -> None:
    outside = path.parents[3] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def garble_manifest(path: Path) -> None:
    (path.parent / "manifest.json").write_text("{")


def escape(path: Path) -> None:
    manifest = path.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"golden.npz"', '"../../golden.npz"'))


def unknown_schema(path: Path) -> None:
    manifest = path.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 2'))


@pytest.mark.parametrize(
    "damage", [flip_byte, truncate, Path.unlink, replace_with_link, garble_manifest, escape, unknown_schema]
)
def test_a_damaged_package_is_refused_and_the_others_are_served(
    damage: object, engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "good")
    damage(write_package(engines, "bad") / "fp32.onnx")  # type: ignore[operator]
    with serve(engines, tmp_path / "log") as server:
        assert [m["name"] for m in server.get("/v1/models").json()["models"]] == ["good"]
        assert server.predict({"x": [[1, 2, 3, 4]]}, model="good").status_code == 200
        assert server.predict({"x": [[1, 2, 3, 4]]}, model="bad").json()["code"] == "unknown_model"
        assert server.metric("vernier_package_refused_total", model="bad", reason="package") == 1
        assert '"package refused"' in server.log


def test_a_package_whose_engine_gives_wrong_answers_is_refused(engines: Path, tmp_path: Path) -> None:
    package = write_package(engines, "wrong")
    other = write_package(tmp_path / "other", "wrong", model=mlp_model(seed=5))
    manifest = (package / "manifest.json").read_text()
    golden = (other / "golden.npz").read_bytes()
    (package / "golden.npz").write_bytes(golden)
    own, others = (
        p.read_text().split('"golden.npz": {')[1].split("}")[0]
        for p in (package / "manifest.json", other / "manifest.json")
    )
    (package / "manifest.json").write_text(manifest.replace(own, others))
    write_package(engines, "good")
    with serve(engines, tmp_path / "log") as server:
        assert [m["name"] for m in server.get("/v1/models").json()["models"]] == ["good"]
        assert server.metric("vernier_package_refused_total", model="wrong") == 1
        assert "fp32" in server.log
