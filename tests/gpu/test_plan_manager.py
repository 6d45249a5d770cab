"""Finding, explaining, rebuilding, proving, measuring and choosing plans, with a real builder process."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, List, Optional

import pytest

from tests.support.executors import Shop, assert_same, random_inputs
from vernier.engine.base import run_once
from vernier.engine.cuda import Device
from vernier.engine.plans.plan_manager import PlanManager
from vernier.engine.plans.plan_source import BuilderProcess, RebuildRequest
from vernier.engine.trt_runtime.trt_api import load_api
from vernier.engine.validated import PlanEvent, ValidatedEngine
from vernier.errors import EngineError
from vernier.package.manifest import Manifest
from vernier.package.plan_cache import PlanCache

BUCKETS = [1, 16, 64]


class Watched:
    """A manager with what it told."""

    def __init__(
        self, shop: Shop, device: Device, cache: PlanCache, name: str = "mlp", **changes: Any
    ) -> None:
        self.events: List[PlanEvent] = []
        self.late: List[ValidatedEngine] = []
        fields: dict = {
            "api": load_api("tensorrt"),
            "device": device,
            "cache": cache,
            "builder": BuilderProcess(),
            "rebuild": "wait",
            "buckets": BUCKETS,
            "on_event": self.events.append,
            "on_ready": self.late.append,
        }
        fields.update(changes)
        manifest = fields.pop("manifest", shop.manifest(name))
        self.manager = PlanManager(shop.package(name), manifest, **fields)

    def kinds(self, precision: str) -> List[str]:
        return [event.kind for event in self.events if event.precision == precision]

    def reason(self, kind: str, precision: str) -> str:
        return next(e.reason for e in self.events if (e.kind, e.precision) == (kind, precision))


def no_builder(request: RebuildRequest) -> bytes:
    raise AssertionError(f"nothing needed to be built, but {request.precision} was asked for")


@pytest.fixture(scope="module")
def filled(shop: Shop, device: Device, tmp_path_factory: pytest.TempPathFactory) -> PlanCache:
    """A cache with the plans of every variant of `mlp`, and the proof that filling it worked."""
    cache = PlanCache(tmp_path_factory.mktemp("cache") / "mlp" / "1")
    watched = Watched(shop, device, cache)
    watched.manager.start()
    assert set(watched.manager.ready) == {"fp32", "tf32", "fp16", "int8"}
    for precision in ("fp32", "tf32", "fp16", "int8"):
        assert watched.kinds(precision) == ["mismatch", "rebuilding", "rebuilt", "ready"]
        assert watched.reason("mismatch", precision) == f"the package has no {precision} plan"
    watched.manager.close()
    return cache


def copy_of(cache: PlanCache, tmp_path: Path) -> PlanCache:
    folder = tmp_path / "mlp" / "1"
    folder.mkdir(parents=True, mode=0o700)
    for path in cache.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return PlanCache(folder)


def test_the_second_start_builds_nothing_and_measures_nothing(
    shop: Shop, device: Device, filled: PlanCache
) -> None:
    watched = Watched(shop, device, filled, builder=no_builder)
    watched.manager.start()
    try:
        assert set(watched.manager.ready) == {"fp32", "tf32", "fp16", "int8"}
        assert {event.kind for event in watched.events} == {"ready"}
        stored = json.loads((filled.folder / "curves.json").read_text())["curves"]
        # Plans that are equal to the byte share a curve.
        assert len(stored) == len({entry.sha256 for entry in filled.plans()})
        for engine in watched.manager.ready.values():
            assert sorted(engine.curve) == BUCKETS
            assert all(1e-6 < seconds < 1 for seconds in engine.curve.values())
    finally:
        watched.manager.close()


def test_what_serves_answers_rightly_and_auto_takes_the_fastest(
    shop: Shop, device: Device, filled: PlanCache
) -> None:
    watched = Watched(shop, device, filled, builder=no_builder)
    watched.manager.start()
    try:
        best = watched.manager.best()
        assert best is not None
        assert best.curve[64] == min(e.curve[64] for e in watched.manager.ready.values())
        slot = watched.manager.ready["fp32"].executor.open_slot()
        inputs = random_inputs("mlp", 16, 1)
        assert_same(run_once(slot, inputs), shop.reference("mlp")(inputs))
        slot.close()
    finally:
        watched.manager.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compute_capability": "8.9"}, "was built for GPU architecture 8.9, but this GPU"),
        ({"runtime_version": "8.4.0.0"}, "was built by tensorrt 8.4.0.0, but this is"),
        ({"variant_sha256": "e" * 64}, "was built from another fp16 variant"),
    ],
)
def test_a_plan_that_does_not_fit_is_explained_and_rebuilt(
    shop: Shop, device: Device, filled: PlanCache, tmp_path: Path, change: dict, words: str
) -> None:
    cache = copy_of(filled, tmp_path)
    index = json.loads((cache.folder / "index.json").read_text())
    for entry in index["plans"]:
        if entry["precision"] == "fp16":
            entry.update(change)
    (cache.folder / "index.json").write_text(json.dumps(index))
    watched = Watched(shop, device, cache)
    watched.manager.start()
    watched.manager.close()
    assert watched.kinds("fp16") == ["mismatch", "rebuilding", "rebuilt", "ready"]
    assert words in watched.reason("mismatch", "fp16")
    assert watched.kinds("int8") == ["ready"]


def test_a_truncated_plan_is_noticed_before_it_is_deserialized(
    shop: Shop, device: Device, filled: PlanCache, tmp_path: Path
) -> None:
    cache = copy_of(filled, tmp_path)
    entry = next(e for e in cache.plans() if e.precision == "int8")
    path = cache.folder / entry.path
    path.write_bytes(path.read_bytes()[:-100])
    watched = Watched(shop, device, cache, rebuild="never")
    watched.manager.start()
    watched.manager.close()
    assert watched.kinds("int8") == ["mismatch", "refused"]
    assert "does not have the sha256 of its index" in watched.reason("mismatch", "int8")
    assert watched.manager.refused["int8"].endswith("VERNIER_REBUILD is never")


def test_in_the_background_the_safest_serves_meanwhile_and_the_rest_is_told(
    shop: Shop, device: Device, filled: PlanCache, tmp_path: Path
) -> None:
    cache = copy_of(filled, tmp_path)
    for entry in cache.plans():
        if entry.precision in ("fp16", "int8"):
            cache.discard(entry)
    go = threading.Event()

    def held_back(request: RebuildRequest) -> bytes:
        assert go.wait(60)
        return BuilderProcess()(request)

    watched = Watched(shop, device, cache, rebuild="background", wanted="int8", builder=held_back)
    watched.manager.start()
    try:
        best = watched.manager.best()
        assert best is not None
        assert best.executor.precision == "tf32"  # the nearest safer one of those that fit
        assert set(watched.manager.pending) == {"fp16", "int8"}
        go.set()
        watched.manager._thread.join(240)
        assert [engine.executor.precision for engine in watched.late] == ["int8", "fp16"]
        best = watched.manager.best()
        assert best is not None
        assert best.executor.precision == "int8"
    finally:
        go.set()
        watched.manager.close()


def test_with_nothing_that_fits_the_safest_is_built_first(shop: Shop, device: Device, tmp_path: Path) -> None:
    asked: List[str] = []

    def refusing(request: RebuildRequest) -> bytes:
        asked.append(request.precision)
        raise EngineError("no")

    watched = Watched(shop, device, PlanCache(tmp_path / "c"), builder=refusing, wanted="int8")
    watched.manager.start()
    assert asked == ["fp32", "tf32", "fp16", "int8"]
    assert watched.manager.best() is None
    assert watched.manager.refused["int8"] == "its plan could not be rebuilt: no"
    watched.manager.close()


def test_an_engine_that_fails_its_golden_vectors_never_serves(
    shop: Shop, device: Device, filled: PlanCache
) -> None:
    fields = shop.manifest("mlp").model_dump()
    fields["variants"]["int8"]["budget"] = {"rel_l2": 1e-9}
    watched = Watched(
        shop, device, filled, manifest=Manifest.model_validate(fields), wanted="int8", builder=no_builder
    )
    watched.manager.start()
    try:
        refusal: Optional[PlanEvent] = next((e for e in watched.events if e.kind == "refused"), None)
        assert refusal is not None
        assert refusal.precision == "int8"
        assert refusal.self_test
        assert "rel_l2<=1e-09" in refusal.reason
        best = watched.manager.best()
        assert best is not None
        assert best.executor.precision == "fp16"
    finally:
        watched.manager.close()


def test_a_plan_with_fewer_profiles_than_slots_is_rebuilt(
    shop: Shop, device: Device, filled: PlanCache, tmp_path: Path
) -> None:
    if not load_api("tensorrt").below_10:
        pytest.skip("from TensorRT 10 on every context shares one profile")
    cache = copy_of(filled, tmp_path)
    for entry in cache.plans():
        if entry.precision != "fp32":
            cache.discard(entry)
    fields = shop.manifest("mlp").model_dump()
    fields["variants"] = {"fp32": fields["variants"]["fp32"]}
    watched = Watched(shop, device, cache, manifest=Manifest.model_validate(fields), slots=3)
    watched.manager.start()
    try:
        assert watched.kinds("fp32") == ["mismatch", "rebuilding", "rebuilt", "ready"]
        assert "has 4 optimization profile(s), but 5 slots are wanted" in watched.reason("mismatch", "fp32")
        slots = [watched.manager.ready["fp32"].executor.open_slot() for _ in range(5)]
        for slot in slots:
            slot.close()
    finally:
        watched.manager.close()


def test_a_cache_that_others_can_write_is_not_trusted_but_the_model_serves(
    shop: Shop, device: Device, filled: PlanCache, tmp_path: Path
) -> None:
    cache = copy_of(filled, tmp_path)
    cache.folder.chmod(0o777)
    fields = shop.manifest("mlp").model_dump()
    fields["variants"] = {"fp32": fields["variants"]["fp32"]}
    watched = Watched(shop, device, cache, manifest=Manifest.model_validate(fields))
    watched.manager.start()
    try:
        assert watched.kinds("fp32") == ["mismatch", "rebuilding", "rebuilt", "ready"]
    finally:
        watched.manager.close()


def test_closing_ends_a_running_build(shop: Shop, device: Device, tmp_path: Path) -> None:
    watched = Watched(shop, device, PlanCache(tmp_path / "c"), rebuild="background")
    watched.manager.start()
    watched.manager.close()
    assert watched.manager.ready == {}
