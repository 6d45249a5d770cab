"""Data that stays in its file: the same rows as in memory, and a sentence when the file changes meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from vernier.builder.samples import sources
from vernier.builder.samples.data import load_samples, one_request_each
from vernier.builder.samples.sources import open_source
from vernier.builder.samples.stored import StoredArray
from vernier.errors import DataChanged
from vernier.tensors import TensorSpec

VALUES = np.random.default_rng(0).standard_normal((60, 5, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_arrays_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_IN_MEMORY_BYTES", 100)


@pytest.fixture(params=["npy", "npz", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """What to open, and the file behind it."""
    if request.param == "npz":
        np.savez(tmp_path / "d.npz", x=VALUES)
        return str(tmp_path / "d.npz"), tmp_path / "d.npz"
    np.save(tmp_path / "x.npy", VALUES)
    return str(tmp_path / "x.npy" if request.param == "npy" else tmp_path), tmp_path / "x.npy"


def test_rows_are_those_of_the_array(source: tuple[str, Path]) -> None:
    found = open_source(source[0], ["x"])["x"]
    assert isinstance(found, StoredArray)
    assert (found.shape, found.dtype, found.ndim, len(found)) == (VALUES.shape, VALUES.dtype, 3, 60)
    assert (found.size, found.nbytes) == (VALUES.size, VALUES.nbytes)
    np.testing.assert_array_equal(np.asarray(found), VALUES)
    for index in (slice(3, 9), slice(None, 70), slice(5, 5), slice(0, 60, 7), slice(9, 3)):
        np.testing.assert_array_equal(found[index], VALUES[index])
    for rows in ([3], [], [5, 6, 7, 2, 2, 59, 0], [59, 58]):
        np.testing.assert_array_equal(found[np.array(rows, np.int64)], VALUES[rows])


def test_rows_are_joined_to_requests_without_reading_them(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    specs = [TensorSpec("x", "float32", (4, 5, 3))]
    samples = one_request_each(load_samples(str(tmp_path / "x.npy"), specs), specs)
    assert len(samples) == 15
    np.testing.assert_array_equal(samples.take([2])["x"][0], VALUES[8:12])


def test_fortran_order_and_a_single_dimension_are_read_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.asfortranarray(VALUES), y=np.arange(60.0))
    np.save(tmp_path / "f.npy", np.asfortranarray(VALUES))
    found = open_source(str(tmp_path / "d.npz"), ["x", "y"])
    np.testing.assert_array_equal(found["x"], VALUES)
    np.testing.assert_array_equal(found["y"][3:5], [3.0, 4.0])
    np.testing.assert_array_equal(open_source(str(tmp_path / "f.npy"), ["x"])["x"], VALUES)


def test_a_file_that_is_truncated_meanwhile_is_said(source: tuple[str, Path]) -> None:
    found = open_source(source[0], ["x"])["x"]
    os.truncate(source[1], source[1].stat().st_size // 2)
    with pytest.raises(
        DataChanged, match=r"changed while the build read it .*build again when the file is complete"
    ):
        found[40:]


def test_a_file_that_is_written_to_meanwhile_is_said(source: tuple[str, Path]) -> None:
    samples = load_samples(source[0], [TensorSpec("x", "float32", ("batch", 5, 3))])
    with source[1].open("r+b") as stream:
        stream.seek(400)
        stream.write(b"\0\0\0\0")
    os.utime(source[1], (1, 1))
    with pytest.raises(DataChanged, match="it was written to"):
        list(samples.batches(8))


def test_a_file_that_is_replaced_stays_what_it_was(source: tuple[str, Path]) -> None:
    found = open_source(source[0], ["x"])["x"]
    other = source[1].with_name("other")
    other.write_bytes(b"another")
    os.replace(other, source[1])
    np.testing.assert_array_equal(found[:], VALUES)
