"""`python -m vernier.tune` on a real package: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.packages import slow_model, write_package
from tests.support.server import serve
from tests.support.specs import make_manifest
from vernier.package.manifest import read_manifest
from vernier.settings import load_settings
from vernier.tune.__main__ import main
from vernier.tune.requests import make_requests

QUICK = ["--seconds", "0.1", "--slots", "1"]


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERNIER_SLOTS", "1")
    write_package(tmp_path / "engines", "slow", model=slow_model(8))
    return tmp_path / "engines"


def test_the_settings_it_chooses_are_served(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vernier.toml").write_text("# kept\n[models.slow]\nprecision = 'fp32'\n")
    assert main([str(engines / "slow" / "1"), "--objective-ms", "200", "--json", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    chosen = found["chosen"]
    tried = {json.dumps(c["settings"]) for c in found["candidates"]}
    assert len(tried) == len(found["candidates"]) > 3
    assert json.dumps(chosen) in tried
    assert max(c["sustained_rate"] for c in found["candidates"]) > 0
    assert any(c["pareto"] for c in found["candidates"])
    assert found["written"] == "vernier.toml"
    written = load_settings().for_model("slow")
    assert (written.slots, written.max_batch) == (chosen["slots"], chosen["max_batch"])
    assert (written.latency_objective_ms, written.precision) == (200, "fp32")
    assert (tmp_path / "vernier.toml").read_text().startswith("# kept\n")
    with serve(engines, tmp_path / "log", config=str(tmp_path / "vernier.toml"), slots="1") as server:
        assert server.predict({"x": [[0.0] * 4]}).status_code == 200
        assert server.metric("vernier_latency_objective_seconds") == 0.2


def test_an_objective_that_nothing_meets_ends_with_one_and_writes_nothing(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(engines / "slow"), "--objective-ms", "0.05", *QUICK]) == 1
    said = capsys.readouterr().err
    assert "no settings answer 99%" in said
    assert "allow more" in said
    assert not (tmp_path / "vernier.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["engines/absent/1", "--objective-ms", "20"], "manifest.json"),
        (["engines/slow/1", "--objective-ms", "20", "--data", "absent.npz"], "absent.npz"),
        (["engines/slow/1", "--objective-ms", "20", "--write", "settings.yaml"], "not a .toml file"),
        (["engines/slow/1", "--objective-ms", "20", "--slots", "0"], "--slots takes numbers"),
        (["engines/slow/1", "--objective-ms", "0"], "objective-ms"),
        (["engines/slow/1"], "objective-ms"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_ends_with_two_and_a_sentence(
    arguments: list[str], says: str, as_json: bool, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *(["--json"] if as_json else [])]) == 2
    written = capsys.readouterr()
    assert says in written.out + written.err
    if as_json and "objective-ms" not in says:
        assert says in json.loads(written.out)["error"]


def test_requests_are_as_long_as_their_lengths_say(tmp_path: Path) -> None:
    manifest = make_manifest(
        inputs=[
            {"name": "x", "dtype": "float32", "shape": ["batch", "frames", 2]},
            {"name": "lengths", "dtype": "int64", "shape": ["batch"]},
        ],
        dims={"batch": {"min": 1, "opt": 2, "max": 4}, "frames": {"min": 2, "opt": 4, "max": 8}},
        sequence=[{"dim": "frames", "buckets": [4, 8], "lengths_input": "lengths"}],
    )
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 8, 2), np.float32), lengths=np.array([1, 5, 8]))
    made = make_requests(tmp_path, manifest, str(tmp_path / "d.npz"), 1)
    assert [r["x"].shape for r in made] == [(1, 2, 2), (1, 5, 2), (1, 8, 2)]
    made = make_requests(tmp_path, manifest, str(tmp_path / "d.npz"), 2)
    assert [r["x"].shape for r in made] == [(2, 5, 2), (2, 8, 2), (2, 8, 2)]


def test_the_package_is_left_as_it_was(engines: Path) -> None:
    package = engines / "slow" / "1"
    before = {p: p.read_bytes() for p in package.rglob("*") if p.is_file()}
    assert main([str(package), "--objective-ms", "500", "--dry-run", *QUICK]) == 0
    assert {p: p.read_bytes() for p in package.rglob("*") if p.is_file()} == before
    assert read_manifest(package).serve == {}
