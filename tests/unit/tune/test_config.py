"""Tuned settings go into the file that the service reads, and nothing else in it changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vernier.settings import SettingsError, load_settings
from vernier.tune import config

CHOSEN = {
    "slots": 1,
    "max_batch": 32,
    "max_queue_delay_ms": 0.5,
    "buckets": [1, 8, 32],
    "sequence_buckets": {"frames": [64, 200]},
    "latency_objective_ms": 20.0,
}


def rewritten(path: Path, name: str = "ranker", chosen: dict[str, object] | None = None) -> str:
    document = config.read(path)
    config.set_model(document, name, chosen or CHOSEN)
    config.write(path, document)
    return path.read_text()


@pytest.mark.parametrize(
    "before",
    [
        "",
        "# ours\nport = 9000  # behind the proxy\n",
        "[models.ranker]\nmax_batch = 64 # was enough\nprecision = 'int8'\n\n[models.other]\nslots = 2\n",
        "models = {ranker = {precision = 'int8'}, other = {slots = 2}}\nport = 9000\n",
        "[models]\nranker.precision = 'int8'\nranker.slots = 7\n",
        "[models.ranker]\nslots = 3\n[tail]\n",
    ],
)
def test_the_service_reads_what_was_written_and_the_rest_stays(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vernier.toml"
    path.write_text(before.replace("[tail]\n", ""))
    monkeypatch.setenv("VERNIER_CONFIG", str(path))
    old = load_settings()
    text = rewritten(path)
    new = load_settings()
    model = new.for_model("ranker")
    assert (model.slots, model.max_batch, model.max_queue_delay_ms) == (1, 32, 0.5)
    assert model.latency_objective_ms == 20
    assert model.buckets == (1, 8, 32)
    assert model.sequence_buckets == {"frames": (64, 200)}
    assert model.precision == old.for_model("ranker").precision
    assert new.for_model("other") == old.for_model("other")
    assert new.port == old.port
    for comment in ("# ours", "# behind the proxy", "# was enough"):
        assert (comment in text) == (comment in before)


def test_what_is_the_packages_own_again_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "vernier.toml"
    rewritten(path)
    text = rewritten(path, chosen={**CHOSEN, "buckets": None, "sequence_buckets": None})
    assert "buckets" not in text
    assert "max_batch = 32" in text


def test_the_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "vernier.toml"
    path.write_text("")
    path.chmod(0o600)
    rewritten(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("vernier.yaml", "", "not a .toml file"),
        ("absent/vernier.toml", "", "no folder"),
        ("vernier.toml", "port = = 1", "cannot be read"),
        ("vernier.toml", "models = 3", "must hold a table"),
        ("vernier.toml", "[models.ranker]\nslot = 3", "models.ranker.slot would not be valid"),
    ],
)
def test_a_file_that_cannot_be_added_to_is_refused_with_a_sentence(
    name: str, text: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if path.parent.is_dir():
        path.write_text(text)
    with pytest.raises(SettingsError, match=says):
        rewritten(path)
    assert not path.parent.is_dir() or path.read_text() == text


def test_variables_that_win_over_the_file_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERNIER_MODELS__RANKER__MAX_BATCH", "64")
    monkeypatch.setenv("VERNIER_MODELS__RANKER__PRECISION", "int8")
    monkeypatch.setenv("VERNIER_MODELS__OTHER__SLOTS", "1")
    assert config.shadowing("ranker", CHOSEN) == ["VERNIER_MODELS__RANKER__MAX_BATCH"]
