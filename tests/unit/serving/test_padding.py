"""Batches are laid out and taken apart without loss, whatever the kind of model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduling import Sent
from tests.support.specs import make_manifest
from vernier.border.batch import RequestBatch
from vernier.package.manifest import SequenceDim
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.queueing.span import BatchState, ExecutionPart, Span
from vernier.tensors import Array, Arrays, TensorSpec

SPEECH = BatchLayout(
    "dynamic",
    [1, 4, 8],
    [
        TensorSpec("features", "float32", ("batch", "frames", 2)),
        TensorSpec("mask", "int64", ("batch", "frames")),
        TensorSpec("lengths", "int64", ("batch",)),
    ],
    [TensorSpec("labels", "float32", ("batch", "frames", 3)), TensorSpec("score", "float32", ("batch", 1))],
    "batch",
    [SequenceDim(dim="frames", buckets=[4, 16], pad_value=-7.0, lengths_input="lengths", mask_input="mask")],
    {"frames": 10},
)


def simple(columns: int) -> BatchLayout:
    """x [batch, columns] → y [batch, columns], batches up to 64 rows."""
    shape = ("batch", columns)
    return BatchLayout(
        "dynamic", [8, 64], [TensorSpec("x", "float32", shape)], [TensorSpec("y", "float32", shape)], "batch"
    )


def test_rows_of_one_batch_that_fill_an_execution_can_be_read_as_they_lie() -> None:
    layout = simple(2)
    x = np.arange(16, dtype=np.float32).reshape(8, 2)

    def read(*parts: ExecutionPart, bucket: int = 8) -> Array | None:
        found = layout.in_place((), parts, bucket)
        return None if found is None else found["x"]

    whole = read(part({"x": x}, 8))
    assert whole is x
    some = read(part({"x": x}, 8, 2, 4), bucket=4)
    assert some is not None
    assert np.shares_memory(some, x)
    np.testing.assert_array_equal(some, x[2:6])
    assert read(part({"x": x}, 8), bucket=64) is None, "rows must be added"
    assert read(part({"x": x[:4]}, 4), part({"x": x[4:]}, 4)) is None, "two batches"
    assert read(part({"x": np.asfortranarray(x)}, 8)) is None
    odd = np.ndarray((8, 2), np.float32, b"\0" * 65, 1)
    assert read(part({"x": odd}, 8)) is None, "not aligned"


@pytest.mark.parametrize(("frames", "fits"), [(16, True), (10, False)])
def test_a_request_that_must_be_padded_cannot(frames: int, fits: bool) -> None:
    inputs = clip(4, frames)
    found = SPEECH.in_place(SPEECH.shape_key(inputs), [part(inputs, 4)], 4)
    assert fits == (found is not None and all(found[name] is inputs[name] for name in inputs))


def part(
    inputs: Arrays,
    rows: int,
    start: int = 0,
    count: int | None = None,
    outputs: Sequence[str] = ("y",),
) -> ExecutionPart:
    """Some rows of a batch of one request."""
    batch = RequestBatch(inputs, [rows], outputs, None, 0, [0.0], None, Sent())
    batch.state = BatchState(batch.rows, 0.0)
    return ExecutionPart(batch, Span(batch, 0, 1, 0.0, 64), start, rows if count is None else count)


def clip(rows: int, frames: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(size=(rows, frames, 2)).astype(np.float32),
        "mask": np.ones((rows, frames), np.int64),
        "lengths": np.full(rows, frames, np.int64),
    }


def staged(
    layout: BatchLayout, parts: list[ExecutionPart], rows: int, bucket: int, key: tuple[int, ...] = ()
) -> Arrays:
    """What a slot would be given; its memory holds rubbish before."""
    views = {
        name: np.full(shape, 99, np.int64 if name in ("ids", "mask", "lengths") else np.float32)
        for name, shape in layout.shapes(key, bucket).items()
    }
    layout.fill(views, parts, rows, bucket)
    return views


@pytest.mark.parametrize(("frames", "key"), [(1, 4), (4, 4), (5, 16), (16, 16), (40, 40)])
def test_lengths_are_padded_to_buckets_and_beyond_the_last_run_as_they_are(frames: int, key: int) -> None:
    assert SPEECH.shape_key(clip(2, frames)) == (key,)
    assert SPEECH.sizes(clip(2, frames)) == (frames,)


def test_short_clips_are_padded_masks_with_zero_and_lengths_stay() -> None:
    short, long = clip(1, 3, 1), clip(2, 16, 2)
    views = staged(SPEECH, [part(short, 1), part(long, 2)], 3, 4, (16,))
    np.testing.assert_array_equal(views["features"][0, :3], short["features"][0])
    np.testing.assert_array_equal(views["features"][0, 3:], -7.0)
    np.testing.assert_array_equal(views["features"][1:3], long["features"])
    np.testing.assert_array_equal(views["mask"][0], [1] * 3 + [0] * 13)
    np.testing.assert_array_equal(views["lengths"], [3, 16, 16, 3])


def test_padding_rows_are_copies_of_a_valid_one() -> None:
    """Rubbish could be an index out of range, or a length beyond this batch's bucket."""
    views = staged(SPEECH, [part(clip(1, 4), 1)], 1, 4, (4,))
    for view in views.values():
        for row in view[1:]:
            np.testing.assert_array_equal(row, view[0])


@pytest.mark.parametrize("fresh", [True, False])
def test_outputs_are_cropped_to_what_each_clip_had(fresh: bool) -> None:
    parts = [part(clip(1, 3), 1, outputs=["labels", "score"]), part(clip(2, 9), 2, outputs=["labels"])]
    labels = np.arange(4 * 16 * 3, dtype=np.float32).reshape(4, 16, 3)
    outputs = {"labels": labels, "score": np.arange(4.0, dtype=np.float32).reshape(4, 1)}
    first, second = SPEECH.take_apart(outputs, parts, fresh)
    np.testing.assert_array_equal(first["labels"], labels[:1, :3])
    np.testing.assert_array_equal(first["score"], [[0.0]])
    np.testing.assert_array_equal(second["labels"], labels[1:3, :9])
    assert list(second) == ["labels"]


def test_outputs_in_reused_memory_are_copied_and_fresh_ones_are_not() -> None:
    """Each part is copied by itself, so that one slow reader does not keep the whole batch."""
    layout = simple(3)
    memory = {"y": np.zeros((8, 3), np.float32)}
    parts = [part({"x": np.zeros((2, 3), np.float32)}, 2) for _ in range(3)]
    assert all(np.shares_memory(mine["y"], memory["y"]) for mine in layout.take_apart(memory, parts, True))
    copies = layout.take_apart(memory, parts, False)
    memory["y"][:] = 1.0
    assert all((mine["y"] == 0.0).all() for mine in copies)
    assert all(mine["y"].base is None for mine in copies)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3), st.booleans())
def test_what_goes_in_comes_out_in_the_same_rows(sizes: list[int], padding: int, fresh: bool) -> None:
    layout = simple(2)
    arrays = [np.random.default_rng(i).normal(size=(n, 2)).astype(np.float32) for i, n in enumerate(sizes)]
    parts = [part({"x": array}, len(array)) for array in arrays]
    rows = sum(sizes)
    views = staged(layout, parts, rows, rows + padding)
    for array, mine in zip(arrays, layout.take_apart({"y": views["x"]}, parts, fresh), strict=True):
        np.testing.assert_array_equal(mine["y"], array)


def test_a_part_of_a_request_is_staged_as_its_rows() -> None:
    layout = BatchLayout("dynamic", [4], [TensorSpec("x", "float32", ("batch", 2))], [], "batch")
    x: Array = np.arange(20.0, dtype=np.float32).reshape(10, 2)
    views = staged(layout, [part({"x": x}, 10, 7, 3), part({"x": x}, 10, 0, 1)], 4, 4)
    np.testing.assert_array_equal(views["x"], np.concatenate([x[7:10], x[:1]]))
    np.testing.assert_array_equal(staged(layout, [part({"x": x}, 10, 5, 4)], 4, 4)["x"], x[5:9])


def test_a_model_without_a_batch_axis_runs_each_request_as_it_is() -> None:
    layout = BatchLayout(
        "none", [1], [TensorSpec("x", "float32", ("n", 3))], [TensorSpec("y", "float32", ("n",))]
    )
    inputs = {"x": np.ones((5, 3), np.float32)}
    assert layout.shape_key(inputs) == (5,)
    assert layout.shapes((5,), 1) == {"x": (5, 3)}
    parts = [part(inputs, 1)]
    np.testing.assert_array_equal(staged(layout, parts, 1, 1, (5,))["x"], inputs["x"])
    memory = np.arange(5.0)
    (mine,) = layout.take_apart({"y": memory}, parts, False)
    memory[:] = 0
    np.testing.assert_array_equal(mine["y"], np.arange(5.0))


def test_a_fixed_batch_is_always_filled_to_its_size() -> None:
    manifest = make_manifest(
        inputs=[{"name": "x", "dtype": "float32", "shape": [4, 3]}],
        outputs=[{"name": "y", "dtype": "float32", "shape": [4, 1]}],
        dims={},
        batching={"kind": "fixed", "size": 4},
    )
    layout = BatchLayout.of(manifest)
    assert (layout.largest, layout.buckets, layout.dims) == (4, [4], ())
    assert layout.shapes((), 4) == {"x": (4, 3)}


@pytest.mark.parametrize(
    ("max_batch", "buckets"), [(None, [1, 8, 16]), (16, [1, 8, 16]), (99, [1, 8, 16]), (5, [1, 5]), (1, [1])]
)
def test_the_operator_may_lower_the_largest_batch(max_batch: int | None, buckets: list[int]) -> None:
    assert BatchLayout.of(make_manifest(), max_batch).buckets == buckets


def test_the_operator_may_choose_the_buckets() -> None:
    manifest = make_manifest(
        inputs=[{"name": "x", "dtype": "float32", "shape": ["batch", "frames"]}],
        dims={"batch": {"min": 1, "opt": 8, "max": 16}, "frames": {"min": 1, "opt": 9, "max": 40}},
        sequence=[{"dim": "frames", "buckets": [20, 40], "pad_values": {"x": 5.0}}],
    )
    layout = BatchLayout.of(manifest, buckets=[2, 12], sequence_buckets={"frames": [10, 30]})
    assert (layout.buckets, layout.largest, layout.typical) == ([2, 12], 12, (10,))
    assert BatchLayout.of(manifest, max_batch=7, buckets=[2, 12]).buckets == [2, 7]
    assert BatchLayout.of(manifest, buckets=[4]).buckets == [4]
    assert [layout.shape_key({"x": np.zeros((1, n), np.float32)}) for n in (3, 11, 31)] == [
        (10,),
        (30,),
        (31,),
    ]
    view = staged(layout, [part({"x": np.zeros((1, 3), np.float32)}, 1)], 1, 2, (10,))["x"]
    np.testing.assert_array_equal(view, [[0.0] * 3 + [5.0] * 7] * 2)


def test_examples_are_valid_inputs() -> None:
    example = SPEECH.example(SPEECH.typical, 4)
    assert SPEECH.typical == (16,)
    assert {name: array.shape for name, array in example.items()} == SPEECH.shapes((16,), 4)
    assert (example["lengths"] == 16).all()
    assert (example["mask"] == 1).all()


def test_elements_sent_and_computed() -> None:
    parts = [part(clip(1, 3), 1), part(clip(2, 9), 2)]
    assert SPEECH.elements(parts, 3, 4, (16,)) == (1 * (6 + 3 + 1) + 2 * (18 + 9 + 1), 4 * (32 + 16 + 1))
    layout = BatchLayout.of(make_manifest())
    assert layout.elements([], 5, 8, ()) == (5 * (3 + 2), 8 * (3 + 2))
