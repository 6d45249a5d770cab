"""The images' recipe as text: linted, non-root, locked. tests/containers builds and runs the images."""

from __future__ import annotations

import re

from tests.ops.conftest import Run
from tests.ops.expressions import ROOT
from vernier.settings import Settings

DOCKERFILE = ROOT / "Dockerfile"
#: Continued lines joined, comments left out.
LINES = re.sub(
    r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
).splitlines()
IMAGES = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE))


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{name} ")]


def test_hadolint_finds_nothing(hadolint: Run) -> None:
    done = hadolint([str(DOCKERFILE)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_finds_nothing_in_the_scripts(shellcheck: Run) -> None:
    scripts = [str(path) for path in sorted((ROOT / "scripts").glob("*.sh"))]
    done = shellcheck([*scripts, str(ROOT / ".ci" / "run")])
    assert done.returncode == 0, done.stdout


def test_the_image_runs_as_an_ordinary_user() -> None:
    assert instructions("USER") == ["10001:10001"]


def test_every_flavour_has_its_stages_and_a_runtime_that_the_service_knows() -> None:
    stages = {line.split()[-1]: line.split()[0] for line in instructions("FROM")}
    for flavour in ("cpu", "gpu", "lean"):
        assert {f"python-{flavour}", f"python-builder-{flavour}", f"system-{flavour}"} <= set(stages)
    runtimes = re.findall(r"VERNIER_RUNTIME=(\S+)", DOCKERFILE.read_text())
    assert [Settings(runtime=name).runtime for name in runtimes] == [
        "onnxruntime",
        "tensorrt",
        "tensorrt-lean",
    ]
    named = {match for base in stages.values() for match in re.findall(r"^\$\{(\w+_IMAGE)\}", base)}
    assert named == set(IMAGES)


def test_it_needs_no_frontend_from_a_registry() -> None:
    assert not re.search(r"^# *syntax *=", DOCKERFILE.read_text(), re.MULTILINE)


def test_every_install_is_locked_with_hashes() -> None:
    installs = [step for text in instructions("RUN") for step in text.split("&&") if "pip" in step]
    installs = [step for step in installs if re.search(r"/pip\S* .*(install|wheel) ", step)]
    installs = [step for step in installs if "/wheels/*.whl" not in step]
    assert len(installs) >= 5
    for step in installs:
        assert "--require-hashes" in step, step
        for name in re.findall(r"-r /requirements/(\S+)", step):
            assert "--hash=sha256:" in (ROOT / "requirements" / name).read_text()


def test_base_images_are_named_once_with_a_tag() -> None:
    assert len(IMAGES) == 4
    for name, value in IMAGES.items():
        assert re.fullmatch(r"[\w./-]+:[\w.-]+(@sha256:[0-9a-f]{64})?", value), name
        assert not value.endswith(":latest"), name
