"""Settings: sources, precedence, and a sentence for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from vernier.settings import ModelSettings, Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_valid_and_frozen() -> None:
    settings = load_settings()
    assert (settings.port, settings.engines_dir) == (8000, Path("engines"))
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vernier.toml", "port = 9000\n[models.ranker]\nmax_batch = 64\n"),
        ("other.toml", "port = 9000\nmodels = {ranker = {max_batch = 64}}\n"),
        ("vernier.yaml", "port: 9000\nmodels: {ranker: {max_batch: 64}}\n"),
    ],
)
def test_a_file_is_read_and_the_environment_wins(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(text)
    if name != "vernier.toml":
        monkeypatch.setenv("VERNIER_CONFIG", name)
    assert load_settings().port == 9000
    assert load_settings().for_model("ranker").max_batch == 64
    monkeypatch.setenv("VERNIER_PORT", "9001")
    assert load_settings().port == 9001


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("VERNIER_PORT", "many", "VERNIER_PORT"),
        ("VERNIER_PORT", "70000", "VERNIER_PORT"),
        ("VERNIER_QUEUE_LIMIT", "0", "VERNIER_QUEUE_LIMIT"),
        ("VERNIER_PROT", "8000", "VERNIER_PROT"),
        ("VERNIER_MODELS__RANKER__SLOT", "2", "SLOT"),
        ("VERNIER_DEVICES", "0,x", "VERNIER_DEVICES"),
        ("VERNIER_CONFIG", "absent.toml", "absent.toml"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_its_name(
    variable: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert named in caught.value.message


def test_a_broken_file_and_an_unknown_name_in_it_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vernier.toml").write_text("port = = 1")
    with pytest.raises(SettingsError, match=r"vernier\.toml"):
        load_settings()
    (tmp_path / "vernier.toml").write_text("prot = 1")
    with pytest.raises(SettingsError, match="PROT"):
        load_settings()


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ({}, "127.0.0.1"),
        ({"ADMIN_TOKEN_FILE": "token", "TLS_CERTIFICATE_FILE": "chain"}, "127.0.0.1"),
        ({"API_KEYS_FILE": "keys"}, "0.0.0.0"),
        ({"JWT_PUBLIC_KEY_FILE": "key"}, "0.0.0.0"),
        ({"TLS_CLIENT_CA_FILE": "authority"}, "0.0.0.0"),
        ({"API_KEYS_FILE": "keys", "HOST": "127.0.0.1"}, "127.0.0.1"),
        ({"HOST": "0.0.0.0"}, "0.0.0.0"),
    ],
)
def test_a_service_that_admits_everybody_is_for_its_own_machine_unless_it_is_told_otherwise(
    given: dict[str, str], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"VERNIER_{name}", value)
    assert load_settings().host == host


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    documented = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert documented == set(Settings.model_fields) | set(ModelSettings.model_fields)
