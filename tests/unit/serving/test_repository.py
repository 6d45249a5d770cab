"""What requests are told of models that are loading, that are not there, and of names that cannot be any."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.support.packages import write_package
from tests.support.scheduling import until
from vernier.composition.engine import model_settings, start_scheduler
from vernier.errors import NotReady, PackageError, UnknownModel, UnknownVersion, VernierError
from vernier.exposition import Metrics
from vernier.metrics import ModelMetrics
from vernier.package.manifest import Manifest
from vernier.serving.models.loading import LoadedEngines, OnnxRuntimeLoader
from vernier.serving.models.repository import Repository
from vernier.serving.monitoring.precision import PrecisionMonitor
from vernier.serving.queueing.sharing import DeviceScheduler
from vernier.serving.scheduling.scheduler import Scheduler
from vernier.settings import Settings

#: Python's int() raises ValueError for these.
LONG = "1" * 5000


class GatedLoader:
    """Loads a package when the test lets it."""

    runtime = "onnxruntime"

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self._gates: dict[str, threading.Event] = {}

    def _gate(self, package: str) -> threading.Event:
        return self._gates.setdefault(package, threading.Event())

    def open(self, *packages: str) -> None:
        for package in packages:
            self._gate(package).set()

    def load(self, package: Path, manifest: Manifest, precision: str) -> LoadedEngines:
        name = f"{manifest.name}/{manifest.version}"
        self.waiting.append(name)
        if not self._gate(name).wait(20):
            raise PackageError(f"the test forgot {name}")
        return OnnxRuntimeLoader(lambda manifest: 1).load(package, manifest, precision)


def repository(folder: Path, loader: GatedLoader) -> Repository:
    settings = Settings(engines_dir=folder)

    async def start(
        manifest: Manifest, engines: LoadedEngines, metrics: ModelMetrics
    ) -> tuple[Scheduler, PrecisionMonitor | None]:
        options = model_settings(settings, manifest, "onnxruntime")
        return await start_scheduler(settings, options, manifest, engines, metrics, DeviceScheduler(1))

    return Repository(
        folder, loader, start, Metrics(CollectorRegistry(), "0"), lambda name: "auto", drain_timeout_s=10.0
    )


@asynccontextmanager
async def loading(folder: Path) -> AsyncIterator[tuple[Repository, GatedLoader]]:
    """A repository that is loading what lies in `folder`, until the block ends."""
    loader = GatedLoader()
    made = repository(folder, loader)
    task = asyncio.create_task(made.load_all())
    try:
        yield made, loader
    finally:
        loader.open("first/1", "second/1", "second/2", "third/1")
        await task
        await made.close()


def refusal(made: Repository, name: str | None, version: str | None = None) -> VernierError:
    with pytest.raises(VernierError) as refused:
        made.resolve(name, version)
    return refused.value


async def test_a_model_that_is_still_loading_is_not_ready_and_an_unknown_one_is_unknown(
    tmp_path: Path,
) -> None:
    write_package(tmp_path, "first")
    write_package(tmp_path, "second", 1)
    write_package(tmp_path, "second", 2)
    async with loading(tmp_path) as (made, loader):
        await until(lambda: loader.waiting == ["first/1"])
        for name, version in (("first", None), ("second", None), ("first", "1"), ("second", "2")):
            error = refusal(made, name, version)
            assert isinstance(error, NotReady), error.message
            assert f"'{name}'" in error.message
            assert "still loading" in error.message
        assert isinstance(refusal(made, "third"), UnknownModel)
        assert isinstance(refusal(made, "second", "3"), UnknownVersion)
        assert isinstance(refusal(made, None), NotReady)
        loader.open("first/1", "second/1")
        await until(lambda: loader.waiting[-1] == "second/2")
        assert made.resolve("first", None).name == "first"
        assert made.resolve("second", None).version == "1"
        assert isinstance(refusal(made, "second", "2"), NotReady)
        assert isinstance(refusal(made, "second", "3"), UnknownVersion)
        assert isinstance(refusal(made, "third"), UnknownModel)
        loader.open("second/2")
        await until(lambda: made.not_ready_reason() is None)
        assert made.resolve("second", None).version == "2"


async def test_a_request_that_names_no_model_waits_until_it_is_known_whether_there_is_one(
    tmp_path: Path,
) -> None:
    """Else the model that is loaded first would answer what was meant for no model in particular."""
    write_package(tmp_path, "first")
    (write_package(tmp_path, "second") / "fp32.onnx").write_bytes(b"damaged")
    write_package(tmp_path, "third")
    async with loading(tmp_path) as (made, loader):
        loader.open("first/1")
        await until(lambda: loader.waiting[-1:] == ["third/1"])
        assert isinstance(refusal(made, None), NotReady)
        assert isinstance(refusal(made, "second"), UnknownModel)  # refused already
        loader.open("third/1")
        await until(lambda: made.not_ready_reason() is None)
        error = refusal(made, None)
        assert isinstance(error, UnknownModel)
        assert "first, third" in error.message


async def test_the_only_model_needs_no_name_once_it_is_loaded(tmp_path: Path) -> None:
    write_package(tmp_path, "first")
    async with loading(tmp_path) as (made, loader):
        await until(lambda: loader.waiting == ["first/1"])
        assert isinstance(refusal(made, None), NotReady)
        loader.open("first/1")
        await until(lambda: made.not_ready_reason() is None)
        assert made.resolve(None, None).name == "first"


async def test_before_the_folder_is_listed_no_model_is_unknown(tmp_path: Path) -> None:
    made = repository(tmp_path, GatedLoader())
    assert isinstance(refusal(made, "first"), NotReady)


async def test_a_folder_that_cannot_be_listed_costs_its_own_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.iterdir

    def iterdir(path: Path) -> object:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    write_package(tmp_path, "first")
    (tmp_path / "locked").mkdir()
    async with loading(tmp_path) as (made, loader):
        loader.open("first/1")
        await until(lambda: made.not_ready_reason() is None)
        with pytest.raises(PackageError, match="Permission denied"):
            await made.load("locked")


@pytest.mark.parametrize("version", [LONG, "0" * 5000 + "1", "²", "-1", "1.0", ""])
async def test_a_version_that_cannot_be_one_is_unknown(version: str, tmp_path: Path) -> None:
    write_package(tmp_path, "first")
    async with loading(tmp_path) as (made, loader):
        loader.open("first/1")
        await until(lambda: made.not_ready_reason() is None)
        error = refusal(made, "first", version)
        assert isinstance(error, UnknownVersion)
        assert len(error.message) < 250


@pytest.mark.parametrize("name", ["first\0", "..", ".", "", "a/b", "x" * 300, "README.md", LONG])
async def test_a_name_that_no_package_can_have_is_unknown(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    write_package(folder, "first")
    write_package(tmp_path, "outside")
    (folder / "README.md").write_text("no folder")
    async with loading(folder) as (made, loader):
        loader.open("first/1")
        await until(lambda: made.not_ready_reason() is None)
        with pytest.raises(UnknownModel) as refused:
            await made.load(name, 1)
        assert len(refused.value.message) < 400
        with pytest.raises(UnknownModel):
            await made.unload(name)
        assert isinstance(refusal(made, name), UnknownModel)
