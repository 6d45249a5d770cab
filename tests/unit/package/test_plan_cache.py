from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from vernier.errors import EngineError, PackageError
from vernier.package.plan_cache import PlanCache, cache_folder
from vernier.package.plans import Target, fit

TARGET = Target("tensorrt", "8.5.1.7", "9.0", "NVIDIA H200")
VARIANT = "a" * 64


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "cache" / "ranker" / "3")


def test_a_plan_comes_back_as_it_was_and_fits_where_it_was_built(cache: PlanCache) -> None:
    entry = cache.add(b"plan", "fp16", TARGET, VARIANT)
    again = PlanCache(cache.folder)
    assert again.plans() == [entry]
    assert again.read(entry) == b"plan"
    assert fit(entry, TARGET, VARIANT) is None


def test_a_rebuilt_plan_takes_the_place_of_the_old_one(cache: PlanCache) -> None:
    old = cache.add(b"old", "fp16", TARGET, VARIANT)
    kept = cache.add(b"other", "int8", TARGET, VARIANT)
    new = cache.add(b"new", "fp16", TARGET, "b" * 64)
    assert cache.plans() == [kept, new]
    assert not (cache.folder / old.path).exists()


def test_a_truncated_plan_is_refused(cache: PlanCache) -> None:
    entry = cache.add(b"a plan of some length", "fp16", TARGET, VARIANT)
    (cache.folder / entry.path).write_bytes(b"a plan of")
    with pytest.raises(PackageError, match="does not have the sha256 of its index"):
        cache.read(entry)


def test_an_index_that_points_outside_its_folder_is_refused(cache: PlanCache, tmp_path: Path) -> None:
    entry = cache.add(b"plan", "fp16", TARGET, VARIANT)
    (tmp_path / "evil.plan").write_bytes(b"plan")
    with pytest.raises(PackageError, match="outside its folder"):
        cache.read(entry.model_copy(update={"path": "../../../evil.plan"}))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_a_folder_that_others_can_write_is_not_read(cache: PlanCache) -> None:
    entry = cache.add(b"plan", "fp16", TARGET, VARIANT)
    cache.folder.chmod(0o777)
    for use in (cache.plans, lambda: cache.read(entry), lambda: cache.add(b"x", "int8", TARGET, VARIANT)):
        with pytest.raises(PackageError, match="can be written by other users"):
            use()


def test_a_new_folder_belongs_to_this_user_alone(cache: PlanCache) -> None:
    cache.prepare()
    assert cache.folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"{", b'{"plans": [{"path": 1}]}', b"\xff\xfe"])
def test_a_damaged_index_counts_as_empty_and_is_written_anew(cache: PlanCache, damage: bytes) -> None:
    cache.add(b"plan", "fp16", TARGET, VARIANT)
    (cache.folder / "index.json").write_bytes(damage)
    assert cache.plans() == []
    entry = cache.add(b"plan", "fp16", TARGET, VARIANT)
    assert cache.plans() == [entry]


def test_a_discarded_plan_is_gone(cache: PlanCache) -> None:
    entry = cache.add(b"plan", "fp16", TARGET, VARIANT)
    cache.discard(entry)
    assert cache.plans() == []
    assert not (cache.folder / entry.path).exists()


def test_two_precisions_may_have_the_same_plan_and_stay_apart(cache: PlanCache) -> None:
    # Below TensorRT 10 a flag only allows FP16; where FP32 is faster the two plans are equal to the byte.
    first = cache.add(b"plan", "fp32", TARGET, VARIANT)
    second = cache.add(b"plan", "fp16", TARGET, VARIANT)
    cache.discard(second)
    assert cache.plans() == [first]
    assert cache.read(first) == b"plan"


def test_latency_curves_belong_to_one_plan_and_one_gpu(cache: PlanCache) -> None:
    cache.save_curve("1" * 64, "NVIDIA H200", {1: 0.5e-3, 64: 2e-3})
    cache.save_curve("2" * 64, "NVIDIA H200", {1: 9.0})
    cache.save_curve("1" * 64, "NVIDIA H200", {1: 0.4e-3})
    assert cache.curve("1" * 64, "NVIDIA H200") == {1: 0.4e-3}
    assert cache.curve("2" * 64, "NVIDIA H200") == {1: 9.0}
    assert cache.curve("1" * 64, "NVIDIA L4") is None


def _add_many(folder: Path, first: int) -> None:
    cache = PlanCache(folder)
    for number in range(first, first + 10):
        target = Target("tensorrt", f"8.5.{number}", "9.0", "NVIDIA H200")
        cache.add(str(number).encode(), "fp16", target, VARIANT)


def test_two_processes_that_write_at_once_lose_nothing(cache: PlanCache) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add_many, args=(cache.folder, first)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(cache.plans()) == 20
    assert {cache.read(entry) for entry in cache.plans()} == {
        str(n).encode() for n in [*range(10), *range(100, 110)]
    }


def _builds(folder: Path, events: multiprocessing.Queue[str]) -> None:
    with PlanCache(folder).build_turn(lambda: time.sleep(0.01)):
        events.put("begin")
        time.sleep(0.2)
        events.put("end")


def test_processes_build_one_after_the_other(cache: PlanCache) -> None:
    """GPUs of one kind need the same plan, which the second process finds when its turn comes."""
    context = multiprocessing.get_context("spawn")
    events: multiprocessing.Queue[str] = context.Queue()
    builders = [context.Process(target=_builds, args=(cache.folder, events)) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(30)
    assert [events.get(timeout=5) for _ in range(6)] == ["begin", "end"] * 3


def test_a_turn_that_is_not_wanted_any_more_is_not_waited_for(cache: PlanCache) -> None:
    def unloaded() -> None:
        raise EngineError("unloaded")

    other = PlanCache(cache.folder)
    with cache.build_turn(unloaded), pytest.raises(EngineError, match="unloaded"), other.build_turn(unloaded):
        pass
    with cache.build_turn(unloaded):  # and it was given back
        pass


def test_the_cache_lies_beside_the_packages_unless_the_setting_says_otherwise() -> None:
    assert cache_folder(Path("engines"), None, "ranker", 3) == Path("engines/.cache/ranker/3")
    assert cache_folder(Path("engines"), Path("/var/cache/v"), "ranker", 3) == Path("/var/cache/v/ranker/3")
