"""The images' recipe: linted, non-root, locked, and copying only what exists."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from scripts.dockerfile import Instruction, Stage, command, expand, flags, read_stages
from scripts.image_in_root import ignored
from tests.ops.conftest import Run
from tests.ops.expressions import ROOT

DOCKERFILE = ROOT / "Dockerfile"
IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
IMAGES = [("cpu", "service"), ("gpu", "service"), ("lean", "service"), ("cpu", "builder"), ("gpu", "builder")]


def chain(flavour: str, target: str) -> Iterator[Stage]:
    """The target's stage and those that it stands on."""
    stages, _ = read_stages(DOCKERFILE, {"FLAVOUR": flavour})
    name: str = target
    while name in stages:
        yield stages[name]
        name = stages[name].base


def last(flavour: str, target: str, name: str) -> Instruction:
    return next(i for stage in chain(flavour, target) for i in reversed(stage.instructions) if i.name == name)


def test_hadolint_finds_nothing(hadolint: Run) -> None:
    done = hadolint([str(DOCKERFILE)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_finds_nothing_in_the_scripts(shellcheck: Run) -> None:
    scripts = [str(path) for path in sorted((ROOT / "scripts").glob("*.sh"))]
    done = shellcheck([*scripts, str(ROOT / ".ci" / "run")])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("flavour", "target"), IMAGES)
def test_every_image_runs_as_an_ordinary_user(flavour: str, target: str) -> None:
    assert last(flavour, target, "USER").text == "10001:10001"


@pytest.mark.parametrize("flavour", ["cpu", "gpu", "lean"])
def test_the_healthcheck_asks_a_route_that_the_service_has(flavour: str) -> None:
    routes = (ROOT / "app" / "vernier" / "api" / "health.py").read_text()
    path = re.search(r"/v2/health/\w+", last(flavour, "service", "HEALTHCHECK").text)
    assert path is not None
    assert f'"{path[0]}"' in routes


@pytest.mark.parametrize(("flavour", "target"), IMAGES)
def test_every_runtime_is_one_that_the_service_knows(flavour: str, target: str) -> None:
    from vernier.settings import Settings

    named = [
        m[1]
        for s in chain(flavour, target)
        for i in s.instructions
        for m in [re.search(r"RUNTIME=(\S+)", i.text)]
        if m
    ]
    assert len(named) == 1
    assert Settings(runtime=named[0]).runtime == named[0]


def test_everything_that_is_copied_exists_and_is_in_the_build_context() -> None:
    stages, _ = read_stages(DOCKERFILE)
    copies = [flags(i.text) for stage in stages.values() for i in stage.instructions if i.name == "COPY"]
    local = [source for given, rest in copies if "from" not in given for source in rest.split()[:-1]]
    assert local
    for source in local:
        path = ROOT / source
        assert path.exists(), source
        inner = next(path.rglob("*.py")) if path.is_dir() else path
        assert not ignored(str(inner.relative_to(ROOT)), IGNORE), source
    for given, _rest in copies:
        assert given.get("from", "python") in stages


def test_every_stage_that_a_flavour_needs_exists() -> None:
    for flavour, target in IMAGES:
        stages, outer = read_stages(DOCKERFILE, {"FLAVOUR": flavour})
        for name in (target, "python", "python-builder"):
            for stage in chain(flavour, name):
                assert stage.base in stages or stage.base in outer.values(), stage.base


def test_every_install_is_locked_with_hashes() -> None:
    stages, _ = read_stages(DOCKERFILE)
    installs = [
        i.text for s in stages.values() for i in s.instructions if i.name == "RUN" and "pip" in i.text
    ]
    for text in installs:
        for step in re.split(r"&&", text):
            if re.search(r"/pip\S* .*(install|wheel) ", step) and "/wheels/*.whl" not in step:
                assert "--require-hashes" in step, step
                for name in re.findall(r"-r /requirements/(\S+)", step):
                    assert "--hash=sha256:" in (ROOT / "requirements" / name).read_text()


def test_secrets_environments_and_engines_stay_out_of_the_build_context() -> None:
    for path in (
        "secrets/key",
        ".env",
        ".git/config",
        "engines/ranker/1/fp32.onnx",
        ".venv/bin/python",
        "tests/x.py",
    ):
        assert ignored(path, IGNORE), path
    assert ignored("app/vernier/__pycache__/main.cpython-311.pyc", IGNORE)
    assert not ignored("app/vernier/api/predict.py", IGNORE)


def test_base_images_are_named_once_with_a_tag() -> None:
    _, outer = read_stages(DOCKERFILE)
    images = {name: value for name, value in outer.items() if name.endswith("_IMAGE")}
    assert len(images) == 4
    for name, value in images.items():
        assert re.fullmatch(r"[\w./-]+:[\w.-]+(@sha256:[0-9a-f]{64})?", value), name
        assert not value.endswith(":latest"), name


def test_the_reader_understands_what_docker_does() -> None:
    assert expand("${A}-$B-${C:-c}-$D", {"A": "1", "B": "2"}) == "1-2-c-"
    assert flags("--from=python --chown=1:1 /a /b") == ({"from": "python", "chown": "1:1"}, "/a /b")
    assert command('["python", "-m", "vernier"]') == ["python", "-m", "vernier"]
    assert command("echo a && echo b") == "echo a && echo b"
