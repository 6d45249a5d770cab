"""Data is checked against the model before anything is built on it, and is never held whole."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from vernier.builder.samples.data import (
    ArraySamples,
    feeds,
    first_and_rest,
    limit,
    load_samples,
    one_request_each,
    open_data,
    positions,
    rows_of,
    split,
    whole_number_notes,
)
from vernier.errors import BuildError
from vernier.tensors import TensorSpec

SPECS = (TensorSpec("x", "float32", ("batch", "frames", 4)), TensorSpec("ids/a:0", "int64", ("batch",)))


def arrays(count: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((count, 5, 4)).astype(np.float32),
        "ids/a:0": np.arange(count),
        "label": np.arange(count) % 2,
    }


def npz(tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "d.npz"
    content = {**arrays(), **changes}
    np.savez(path, **{k: v for k, v in content.items() if v is not None})  # type: ignore[arg-type]
    return str(path)


def same(batch: dict[str, np.ndarray], rows: slice) -> None:
    for name in ("x", "ids/a:0"):
        np.testing.assert_array_equal(batch[name], arrays()[name][rows])


def test_every_kind_of_source_gives_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "x.npy", arrays()["x"])
    np.save(folder / "ids_a_0.npy", arrays()["ids/a:0"])
    np.save(folder / "label.npy", arrays()["label"])
    compressed = tmp_path / "c.npz"
    np.savez_compressed(compressed, **arrays())
    module = tmp_path / "my_source.py"
    module.write_text(
        "import numpy as np\n"
        f"def whole():\n    return dict(np.load({str(compressed)!r}))\n"
        "def pieces():\n    data = whole()\n"
        "    for start in (0, 4, 8):\n        yield {k: v[start:start + 4] for k, v in data.items()}\n"
    )
    monkeypatch.chdir(tmp_path)
    hashes = set()
    for source in (
        npz(tmp_path), str(folder), str(compressed), f"{module}:whole", "my_source:whole", "my_source:pieces"
    ):  # fmt: skip
        samples = load_samples(source, SPECS, need_labels=True)
        assert samples.names == ("x", "ids/a:0")
        assert len(samples) == 10
        np.testing.assert_array_equal(samples.labels, arrays()["label"])
        for _ in range(2):  # restartable
            batches = list(samples.batches(4))
            assert [len(b["x"]) for b in batches] == [4, 4, 2]
            same(batches[1], slice(4, 8))
        np.testing.assert_array_equal(samples.take([7, 2])["ids/a:0"], [7, 2])
        hashes.add(samples.sha256)
    assert len(hashes) == 1
    assert "" not in sys.path[:1] or sys.path.count("") < 2


def test_the_hash_sees_one_changed_number(tmp_path: Path) -> None:
    before = load_samples(npz(tmp_path), SPECS).sha256
    changed = arrays()["x"]
    changed[3, 2, 1] += 1e-3
    assert load_samples(npz(tmp_path, x=changed), SPECS).sha256 != before


def test_one_file_per_sample_is_stacked(tmp_path: Path) -> None:
    for i in range(6):
        np.save(tmp_path / f"{i:03}.npy", np.full((5, 4), i, np.float32))
    samples = load_samples(str(tmp_path), SPECS[:1])
    assert len(samples) == 6
    np.testing.assert_array_equal(samples.take([4])["x"], np.full((1, 5, 4), 4))
    np.save(tmp_path / "006.npy", np.zeros((7, 4), np.float32))
    with pytest.raises(BuildError, match="do not stack to samples of one shape"):
        load_samples(str(tmp_path), SPECS[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, r"no array for the input x \(it has ids/a:0, label\)"),
        (
            {"x": np.zeros((10, 5, 3), np.float32)},
            r"has shape \[10, 5, 3\], but the model takes \[batch, frames, 4\]",
        ),
        ({"x": np.zeros((10, 4), np.float32)}, r"store it as \[samples, frames, 4\]"),
        ({"x": np.zeros((10, 0, 4), np.float32)}, "has shape"),
        ({"x": np.zeros((9, 5, 4), np.float32)}, "differ in their number of samples"),
        ({"x": np.full((10, 5, 4), np.nan, np.float32)}, "holds NaN or infinity"),
        ({"x": np.zeros((10, 5, 4), np.int32)}, "holds int32, but the model takes float32"),
        ({"ids/a:0": np.zeros(10, np.float32)}, "holds float32, but the model takes int64"),
        ({"ids/a:0": np.full(10, 2**63, np.uint64)}, "holds numbers that int64 cannot"),
        ({"label": None}, "has no labels under 'label'"),
        ({"label": np.zeros(3)}, "differ in their number of samples"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused_in_words(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=message):
        load_samples(npz(tmp_path, **changes), SPECS, need_labels=True)


def test_no_samples_at_all_is_refused(tmp_path: Path) -> None:
    empty = {name: array[:0] for name, array in arrays().items()}
    with pytest.raises(BuildError, match="holds no samples"):
        load_samples(npz(tmp_path, **empty), SPECS)


def test_narrower_numbers_widen(tmp_path: Path) -> None:
    samples = load_samples(
        npz(tmp_path, x=arrays()["x"].astype(np.float64), **{"ids/a:0": np.arange(10, dtype=np.uint8)}), SPECS
    )
    batch = samples.take([3])
    assert (batch["x"].dtype, batch["ids/a:0"].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint16])
def test_whole_numbers_become_floats_without_loss_and_that_is_said(kind: type, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 127, (10, 5, 4)).astype(kind)
    source = npz(tmp_path, x=values)
    batch = load_samples(source, SPECS).take([3])
    assert batch["x"].dtype == np.float32
    np.testing.assert_array_equal(batch["x"][0], values[3])
    (note,) = whole_number_notes(open_data(source, ["x"]), source, SPECS[:1])
    assert f"holds {np.dtype(kind).name}" in note
    assert "nothing is scaled" in note


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    np.savez(path, x=np.array([{"a": 1}, None], dtype=object))
    with pytest.raises(BuildError, match="Python objects, which are never loaded"):
        load_samples(str(path), SPECS)


def test_damaged_and_absent_sources_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    whole = Path(npz(tmp_path)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BuildError, match=r"not a whole .npz file"):
        load_samples(str(path), SPECS)
    with pytest.raises(BuildError, match="there is no data at"):
        load_samples(str(tmp_path / "absent.npz"), SPECS)
    with pytest.raises(BuildError, match="cannot import the data source"):
        load_samples("no_such_module_here:f", SPECS)
    with pytest.raises(BuildError, match="has no function 'g'"):
        load_samples("json:g", SPECS)
    (tmp_path / "boom.py").write_text("def f():\n    yield {'x': [[1.0]]}\n    raise KeyError('gone')\n")
    with pytest.raises(BuildError, match="failed with KeyError: 'gone'"):
        load_samples(f"{tmp_path / 'boom.py'}:f", SPECS)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(BuildError, match=r"holds no .npy files"):
        load_samples(str(tmp_path / "hollow"), SPECS)


def test_a_split_is_disjoint_complete_and_repeatable(tmp_path: Path) -> None:
    samples = load_samples(npz(tmp_path), SPECS)
    one, two = split(samples, 6)
    ids = [np.concatenate([b["ids/a:0"] for b in part.batches(4)]) for part in (one, two)]
    assert (len(one), len(two)) == (6, 4)
    assert sorted(np.concatenate(ids)) == list(range(10))
    assert list(ids[0]) != list(range(6)), "files sorted by label must not be cut in two"
    np.testing.assert_array_equal(one.labels, arrays()["label"][ids[0]])
    assert split(samples, 6)[0].sha256 == one.sha256 != two.sha256
    assert len(limit(samples, 3)) == 3
    assert limit(samples, 99) is samples


@pytest.mark.parametrize(
    ("shape", "specs_shape", "sizes", "counts"),
    [
        ((5, 3), ("batch", 3), [(2, 3), (2, 3), (1, 3)], [2, 2, 1]),
        ((5, 3), (4, 3), [(4, 3), (4, 3)], [4, 1]),
        ((5, 2, 3), (2, 3), [(2, 3)] * 5, [1] * 5),
        ((5,), (), [()] * 5, [1] * 5),
    ],
)
def test_feeds_suit_dynamic_fixed_and_absent_batch_axes(
    shape: tuple[int, ...],
    specs_shape: tuple[int | str, ...],
    sizes: list[tuple[int, ...]],
    counts: list[int],
) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    samples, specs = ArraySamples({"x": values}), [TensorSpec("x", "float32", specs_shape)]
    made = list(feeds(samples, specs, 2))
    assert [b["x"].shape for b, _ in made] == sizes
    assert [count for _, count in made] == counts
    alone = len(specs_shape) < len(shape)
    back = np.concatenate([rows_of([b["x"]], count, alone)[0] for b, count in made])
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize(
    ("shape", "specs_shape", "grouped"),
    [
        ((7, 3), ("n", 3), (7, 1, 3)),
        ((7, 3), (2, 3), (3, 2, 3)),
        ((7, 5, 3), ("n", 3), (7, 5, 3)),
        ((7,), (), (7,)),
    ],
)
def test_models_without_a_batch_get_whole_requests(
    shape: tuple[int, ...], specs_shape: tuple[int | str, ...], grouped: tuple[int, ...]
) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    specs = [TensorSpec("x", "float32", specs_shape)]
    samples = one_request_each(ArraySamples({"x": values}, np.arange(7)), specs)
    assert samples.take(range(len(samples)))["x"].shape == grouped
    assert samples.labels is not None
    assert len(samples.labels) == len(samples) == grouped[0]
    np.testing.assert_array_equal(
        samples.take([0])["x"].reshape(-1), values.reshape(-1)[: samples.take([0])["x"].size]
    )
    assert all(f["x"].shape == grouped[1:] for f, _ in feeds(samples, specs, 8))


@pytest.mark.parametrize("compress", [False, True])
def test_large_arrays_are_mapped_and_not_held(compress: bool, tmp_path: Path) -> None:
    """150 MB are walked through while the process may grow by 75 MB; mapped pages do not count as heap."""
    path = tmp_path / "large.npz"
    big = np.zeros((150, 256, 1024), np.float32)
    (np.savez_compressed if compress else np.savez)(path, x=big)
    del big
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text().splitlines()
    used = int(next(line for line in status if line.startswith("VmData")).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + (75 << 20), before[1]))
    try:
        samples = load_samples(str(path), [TensorSpec("x", "float32", ("batch", 256, 1024))])
        assert sum(float(batch["x"].sum()) for batch in samples.batches(16)) == 0.0
        assert len(samples.sha256) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_what_was_read_of_a_mapped_file_is_given_back(tmp_path: Path) -> None:
    """Pages of a mapped file count as the process's memory for as long as they are there."""
    np.save(tmp_path / "x.npy", np.ones((200, 500_000), np.float32))
    samples = load_samples(str(tmp_path / "x.npy"), [TensorSpec("x", "float32", ("batch", 500_000))])

    def mapped_bytes() -> int:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))

    before = mapped_bytes()
    assert samples.sha256
    assert sum(len(batch["x"]) for batch in samples.batches(8)) == 200
    assert mapped_bytes() - before < 50 << 20


def test_subsets_know_where_they_stand() -> None:
    whole = ArraySamples({"x": np.arange(50, dtype=np.float32)[:, None]})
    first, second = split(whole, 20)
    few = limit(second, 7)
    np.testing.assert_array_equal(few.take(range(7))["x"], whole.take(positions(few, whole).tolist())["x"])
    assert set(positions(first, whole)) | set(positions(second, whole)) == set(range(50))
    with pytest.raises(ValueError, match="not a subset"):
        positions(ArraySamples({"x": np.zeros((3, 1))}), whole)
    beginning, rest = first_and_rest(few, 3)
    assert rest is not None
    assert (len(beginning), len(rest)) == (3, 4)
    assert first_and_rest(few, 7) == (few, None)
