"""When the examples are built, and when an engines folder is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import build, demo


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the examples that the builder was called for."""
    names: list[str] = []

    def call(model: str, out: Path) -> int:
        names.append(model)
        return 0

    monkeypatch.setattr(build, "build", call)
    return names


def package(engines: Path, name: str) -> None:
    (engines / name / "1").mkdir(parents=True)
    (engines / name / "1" / "manifest.json").touch()


def test_what_is_there_already_is_not_built_again(engines: Path, built: list[str]) -> None:
    package(engines, "ranker")
    assert build.main(["--out", str(engines)]) == 0
    assert built == ["keywords"]


def test_at_first_nothing_is_built_without_being_asked_for(
    engines: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ["--first", "--out", str(engines)]
    monkeypatch.delenv("VERNIER_EXAMPLES", raising=False)
    assert build.main(first) == 0
    monkeypatch.setenv("VERNIER_EXAMPLES", "0")
    assert build.main(first) == 0
    assert built == []
    monkeypatch.setenv("VERNIER_EXAMPLES", "1")
    (engines / ".cache" / "x").mkdir(parents=True)
    (engines / ".cache" / "x" / "manifest.json").touch()
    assert build.main(first) == 0
    assert built == ["ranker", "keywords"]


def test_at_first_a_folder_with_another_package_is_left_alone(
    engines: Path, built: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VERNIER_EXAMPLES", "1")
    package(engines, "own")
    assert build.main(["--first", "--out", str(engines)]) == 0
    assert built == []
    assert "own" in capsys.readouterr().out


def test_a_failed_build_ends_with_its_code(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda model, out: 1)
    assert build.main(["--out", str(engines)]) == 1
    with pytest.raises(SystemExit, match="2"):
        build.main(["nobody"])


def test_the_demo_rises_and_falls_around_its_mean() -> None:
    rates = [demo.rate_at(second, 20.0) for second in range(int(demo.PERIOD_S))]
    assert sum(rates) / len(rates) == pytest.approx(20.0)
    assert (min(rates), max(rates)) == (pytest.approx(10.0, rel=0.01), pytest.approx(30.0, rel=0.01))
    for rate in ("0", "-1", "nan", "5000"):
        with pytest.raises(SystemExit, match="2"):
            demo.main(["--rate", rate])
