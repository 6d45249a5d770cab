"""A calibration cache says what it was made for, and is used for nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vernier.errors import BuildError
from vernier.package.calibration import (
    CACHE_NAME,
    SIDECAR_NAME,
    WEIGHTS_NAME,
    Calibration,
    StoredWeight,
    check_calibration,
    format_cache,
    parse_cache,
    read_calibration,
    write_calibration,
)

MODEL, OTHER = "a" * 64, "b" * 64


def calibration(**changes: object) -> Calibration:
    made = Calibration(
        model_sha256=MODEL,
        data_sha256="d" * 64,
        method="best",
        samples=128,
        scales={"x": 0.0078125, "odd: name/ü\n50%": 0.125},
        per_tensor_method={"x": "mse", "odd: name/ü\n50%": "minmax"},
        peaks={"x": 1.0},
        weights={
            "conv:0": StoredWeight(
                np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
                np.array([0.5, 0.25, 0.125], np.float32),
                0,
                np.array([1, 2, 3], np.float32),
                "gptq",
            ),
            "deconv": StoredWeight(np.ones((2, 2), np.int8), np.float32(0.5).reshape(()), 1),
        },
        weight_method="best",
        tools={"numpy": "2"},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_the_text_is_tensorrts() -> None:
    text = format_cache({"input": 0.0078740157, "conv1": 0.123}, "entropy")
    assert text == "TRT-8501-EntropyCalibration2\nconv1: 3dfbe76d\ninput: 3c010204\n"
    assert parse_cache(text, "here") == {
        "conv1": pytest.approx(0.123),
        "input": pytest.approx(0.0078740157),
    }
    assert format_cache({}, "minmax").startswith("TRT-8501-MinMaxCalibration")


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
        st.floats(2.0**-40, 2.0**40, width=32),
        max_size=8,
    )
)
def test_any_name_and_scale_survives(scales: dict[str, float]) -> None:
    assert parse_cache(format_cache(scales, "best"), "here") == scales


def test_writing_and_reading_gives_the_same(tmp_path: Path) -> None:
    made = calibration()
    paths = write_calibration(tmp_path, made)
    assert [p.name for p in paths] == [CACHE_NAME, SIDECAR_NAME, WEIGHTS_NAME]
    for where in (tmp_path, tmp_path / CACHE_NAME):
        found = read_calibration(where)
        assert replace(found, weights={}) == replace(made, weights={})
        for name, weight in made.weights.items():
            again = found.weights[name]
            assert np.array_equal(again.values, weight.values)
            assert again.values.dtype == np.int8
            assert np.array_equal(again.scales, weight.scales)
            assert again.scales.shape == weight.scales.shape
            assert (again.axis, again.method) == (weight.axis, weight.method)
            assert (again.bias_correction is None) == (weight.bias_correction is None)


def test_a_cache_without_weights_is_two_files(tmp_path: Path) -> None:
    paths = write_calibration(tmp_path, calibration(weights={}))
    assert [p.name for p in paths] == [CACHE_NAME, SIDECAR_NAME]
    assert read_calibration(tmp_path).weights == {}


def test_the_right_build_may_use_it() -> None:
    made = calibration()
    check_calibration(made, Path("c"), MODEL, made.scales, "best", "d" * 64)
    check_calibration(made, Path("c"), MODEL, made.scales)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_sha256": OTHER}, f"model with sha256 {MODEL}, and this build has {OTHER}"),
        ({"method": "minmax"}, "the method best, and this build has minmax"),
        ({"data_sha256": OTHER}, f"{'d' * 64}, and this build has {OTHER}"),
        ({"tensors": ["x", "y"]}, "scales of 2 tensors and the model needs 2 .*needs 'y'.*cache has 'odd"),
        ({"tensors": ["x"]}, "scales of 2 tensors and the model needs 1"),
    ],
)
def test_a_mismatch_names_both_sides(changes: dict[str, object], words: str) -> None:
    made = calibration()
    asked: dict[str, object] = {
        "model_sha256": MODEL,
        "tensors": list(made.scales),
        "method": "best",
    } | changes
    with pytest.raises(BuildError, match=f"(?s)cache.file was made for.*{words}|{words}"):
        check_calibration(made, Path("cache.file"), **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line", ["x 3c010204", "x: zz", "x: 00000000", "x: 7f800000", "x: bf800000", "x: 3c0102"]
)
def test_a_line_of_another_format_is_named(line: str) -> None:
    with pytest.raises(BuildError, match="line 2 of here is not of the form"):
        parse_cache(f"TRT-8501-X\n{line}\n", "here")


@pytest.mark.parametrize("text", ["", "hello\n"])
def test_another_file_is_no_cache(text: str) -> None:
    with pytest.raises(BuildError, match="its first line should start with 'TRT-'"):
        parse_cache(text, "here")


def test_damage_is_found(tmp_path: Path) -> None:
    made = calibration()

    def damaged(name: str, change: bytes | None) -> str:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_calibration(folder, made)
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(change)
        with pytest.raises(BuildError) as caught:
            read_calibration(folder / CACHE_NAME)
        return caught.value.message

    assert "cannot read the calibration cache" in damaged(CACHE_NAME, None)
    assert "no calibration.json beside it" in damaged(SIDECAR_NAME, None)
    assert "is missing" in damaged(WEIGHTS_NAME, None)
    assert "was changed after" in damaged(WEIGHTS_NAME, b"PK")
    changed = format_cache({**made.scales, "x": 0.5}, "best").encode()
    assert "was changed after" in damaged(CACHE_NAME, changed)
    assert "no calibration sidecar" in damaged(SIDECAR_NAME, b"{}")
    assert "no calibration sidecar" in damaged(SIDECAR_NAME, b"\xff")
    newer = json.dumps({"sidecar_version": 2, "files": {}, "tensors": {}}).encode()
    assert "has version 2" in damaged(SIDECAR_NAME, newer)
