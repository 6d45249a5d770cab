"""The file of `--timing-cache`: timings come back, and a file of another kind is never lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vernier.builder.plans import plan
from vernier.builder.plans.plan import BuiltPlan, PlanOptions, _load_timing_cache, _save_timing_cache
from vernier.engine.trt_runtime.trt_api import TrtApi, load_api
from vernier.errors import BuildError

#: What the fake's empty cache is saved as, and how one with timings begins.
EMPTY, TIMINGS = b"ptrt-no-timings", b"ptrt-timings "
GPU = b"this GPU"


class FakeCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> memoryview:
        return memoryview(self.data)


class FakeConfig:
    """A builder's configuration that does with caches what TensorRT does.

    Args:
        unreadable: what it hands out for what is no cache: TensorRT an empty cache, older ones perhaps None.
    """

    def __init__(self, unreadable: bytes | None = EMPTY) -> None:
        self._unreadable = unreadable
        self.cache: FakeCache | None = None

    def create_timing_cache(self, stored: bytes) -> FakeCache | None:
        if stored.startswith(TIMINGS):
            return FakeCache(stored)
        return FakeCache(EMPTY) if not stored else self._unreadable and FakeCache(self._unreadable)  # type: ignore[return-value]

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        fits = cache.data in (EMPTY, TIMINGS + GPU)
        if fits:
            self.cache = cache
        return fits

    def get_timing_cache(self) -> FakeCache:
        assert self.cache is not None
        return self.cache


def api(without_gpu: bool = False) -> Any:
    return SimpleNamespace(runtime="tensorrt", version="10.9.0", builds_without_gpu=without_gpu)


def options(path: Path | None, own: bool = False) -> PlanOptions:
    return PlanOptions("tensorrt", "fp32", timing_cache=path, own_timing_cache=own)


def _data(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, x=np.zeros((4, 8), np.float32))


def _another_gpu(path: Path) -> None:
    path.write_bytes(TIMINGS + b"another GPU")


def _as_long_as_an_empty_cache(path: Path) -> None:
    path.write_bytes(b"x" * len(EMPTY))


FOREIGN = [_data, _another_gpu, _as_long_as_an_empty_cache]


@pytest.mark.parametrize("contents", [None, b"", EMPTY, TIMINGS + GPU])
def test_timings_are_read_and_saved_whole(tmp_path: Path, contents: bytes | None) -> None:
    path, config = tmp_path / "t.timing", FakeConfig()
    if contents is not None:
        path.write_bytes(contents)
    assert _load_timing_cache(api(), config, options(path))
    assert config.get_timing_cache().data == (contents or EMPTY)
    config.cache = FakeCache(TIMINGS + GPU)
    assert _save_timing_cache(config, path) == []
    assert path.read_bytes() == TIMINGS + GPU
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("unreadable", [EMPTY, None])
@pytest.mark.parametrize("make", FOREIGN)
def test_a_file_without_timings_for_this_gpu_is_refused_and_kept(
    tmp_path: Path, make: Callable[[Path], None], unreadable: bytes | None
) -> None:
    path = tmp_path / "e.npz"
    make(path)
    kept = path.read_bytes()
    sentence = (
        r"e\.npz holds no timings that tensorrt 10\.9\.0 can use on this GPU, so it is kept: give --timing"
    )
    with pytest.raises(BuildError, match=sentence):
        _load_timing_cache(api(), FakeConfig(unreadable), options(path))
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", FOREIGN)
def test_the_services_own_cache_is_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path, config = tmp_path / "t.timing", FakeConfig()
    make(path)
    assert _load_timing_cache(api(), config, options(path, own=True))
    assert config.get_timing_cache().data == EMPTY


def test_a_builder_process_may_replace_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[PlanOptions] = []

    def build(model: Path, inputs: object, options: PlanOptions) -> BuiltPlan:
        given.append(options)
        return BuiltPlan(b"plan", "10.9.0")

    monkeypatch.setattr(plan, "build_plan", build)
    fields = {"runtime": "tensorrt", "precision": "fp32", "dims": {}, "compute_capabilities": []}
    request = {"model": "m", "inputs": [], "options": {**fields, "timing_cache": "t.timing"}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    plan.run_request(tmp_path / "request.json", tmp_path / "out")
    assert given[0].own_timing_cache


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "absent")
    for path in (tmp_path, pipe, link):
        with pytest.raises(BuildError, match="is no regular file: give --timing-cache"):
            _load_timing_cache(api(), FakeConfig(), options(path))
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.timing"
    path.write_bytes(TIMINGS + GPU)

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read everything
    with pytest.raises(BuildError, match=r"cannot read .*t\.timing: Permission denied; give --timing-cache"):
        _load_timing_cache(api(), FakeConfig(), options(path))


def test_nothing_is_read_where_nothing_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "e.npz"
    _data(path)
    assert not _load_timing_cache(api(without_gpu=True), FakeConfig(), options(path))
    assert not _load_timing_cache(api(), FakeConfig(), options(None))


def test_a_write_that_fails_is_noted_and_keeps_the_timings_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tmp_path / "t.timing", FakeConfig()
    path.write_bytes(TIMINGS + GPU)
    config.cache = FakeCache(EMPTY)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert _save_timing_cache(config, path) == [
        f"the timing cache {path} is not kept: No space left on device"
    ]
    assert path.read_bytes() == TIMINGS + GPU
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:.*Timing cache operations:DeprecationWarning")
def test_the_real_library_hands_out_empty_caches_and_its_files_are_refused(tmp_path: Path) -> None:
    # TensorRT-RTX shares the code; without a GPU it reads no cache at all, but makes and saves empty ones.
    real: TrtApi = load_api("tensorrt-rtx")
    builder = real.module.Builder(real.log)  # must outlive its configuration
    config = builder.create_builder_config()
    path = tmp_path / "e.npz"
    _data(path)
    assert config.create_timing_cache(path.read_bytes()) is not None
    with pytest.raises(BuildError, match="holds no timings that tensorrt"):
        _load_timing_cache(api(), config, options(path))
    path.unlink()
    for _ in range(2):
        assert _load_timing_cache(api(), config, options(path))
        assert _save_timing_cache(config, path) == []
        assert path.stat().st_size > 0
