"""The one check between the codecs and the queue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.specs import make_signature
from vernier.errors import (
    MissingInput,
    NonFiniteInput,
    RequestError,
    UnknownInput,
    UnknownOutput,
    WrongDtype,
    WrongShape,
)
from vernier.tensors import Arrays


def request(rows: int = 2, **changes: Any) -> Arrays:
    return {"dense": np.zeros((rows, 3), np.float32), "ids": np.zeros((rows, 2), np.int64), **changes}


@pytest.mark.parametrize("rows", [1, 16, 17, 1000])
def test_any_number_of_rows_is_taken_since_larger_requests_are_split(rows: int) -> None:
    assert make_signature().check(request(rows)) == rows


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dense": np.zeros((2, 4), np.float32)}, WrongShape),
        ({"dense": np.zeros(3, np.float32)}, WrongShape),
        ({"dense": np.zeros((2, 3, 1), np.float32)}, WrongShape),
        ({"dense": np.zeros((3, 3), np.float32)}, WrongShape),
        ({"dense": np.zeros((2, 3), np.float64)}, WrongDtype),
        ({"ids": np.zeros((2, 2), np.int32)}, WrongDtype),
        ({"dense": np.full((2, 3), np.nan, np.float32)}, NonFiniteInput),
        ({"dense": np.full((2, 3), -np.inf, np.float32)}, NonFiniteInput),
        ({"other": np.zeros((2, 3), np.float32)}, UnknownInput),
    ],
)
def test_what_does_not_fit_is_refused(changes: Arrays, error: type[RequestError]) -> None:
    with pytest.raises(error):
        make_signature().check(request(**changes))


def test_missing_inputs_and_empty_requests_are_refused() -> None:
    with pytest.raises(MissingInput, match="'ids'"):
        make_signature().check({"dense": np.zeros((2, 3), np.float32)})
    with pytest.raises(WrongShape, match="no rows"):
        make_signature().check(request(rows=0))


def test_large_finite_values_whose_sum_overflows_are_taken() -> None:
    big = np.full((2, 3), np.finfo(np.float32).max, np.float32)
    assert make_signature().check(request(dense=big)) == 2


def test_a_named_dimension_besides_the_batch_must_be_in_its_range() -> None:
    signature = make_signature(
        inputs=[{"name": "x", "dtype": "float32", "shape": ["batch", "frames"]}],
        dims={"batch": {"min": 1, "opt": 8, "max": 16}, "frames": {"min": 2, "opt": 4, "max": 6}},
    )
    assert signature.check({"x": np.zeros((3, 6), np.float32)}) == 3
    with pytest.raises(WrongShape, match="2 to 6"):
        signature.check({"x": np.zeros((3, 7), np.float32)})


def test_a_fixed_batch_takes_any_number_of_rows_and_no_batching_takes_one_request() -> None:
    inputs = [
        {"name": "a", "dtype": "float32", "shape": [4, 3]},
        {"name": "b", "dtype": "float32", "shape": [4, 2]},
    ]
    outputs = [{"name": "y", "dtype": "float32", "shape": [4, 1]}]
    fixed = make_signature(inputs=inputs, outputs=outputs, dims={}, batching={"kind": "fixed", "size": 4})
    assert fixed.check({"a": np.zeros((6, 3), np.float32), "b": np.zeros((6, 2), np.float32)}) == 6
    with pytest.raises(WrongShape):
        fixed.check({"a": np.zeros((6, 3), np.float32), "b": np.zeros((5, 2), np.float32)})
    alone = make_signature(inputs=inputs, outputs=outputs, dims={}, batching={"kind": "none"})
    assert alone.check({"a": np.zeros((4, 3), np.float32), "b": np.zeros((4, 2), np.float32)}) == 1


def test_unknown_outputs_are_refused_and_none_means_all() -> None:
    assert make_signature().select_outputs(None) == ("score",)
    with pytest.raises(UnknownOutput, match="'score'"):
        make_signature().select_outputs(["scores"])


def test_lengths_and_masks_of_a_padded_dimension_may_be_left_out() -> None:
    signature = make_signature(
        inputs=[
            {"name": "x", "dtype": "float32", "shape": ["batch", "frames", 2]},
            {"name": "lengths", "dtype": "int64", "shape": ["batch"]},
            {"name": "mask", "dtype": "bool", "shape": ["batch", "frames"]},
        ],
        dims={"batch": {"min": 1, "opt": 8, "max": 16}, "frames": {"min": 1, "opt": 4, "max": 9}},
        sequence=[{"dim": "frames", "buckets": [4, 9], "lengths_input": "lengths", "mask_input": "mask"}],
    )
    arrays: Arrays = {"x": np.zeros((3, 5, 2), np.float32)}
    assert signature.check(arrays) == 3
    assert arrays["lengths"].tolist() == [5, 5, 5]
    assert arrays["mask"].shape == (3, 5)
    assert arrays["mask"].all()
    own: Arrays = {"x": np.zeros((1, 5, 2), np.float32), "lengths": np.array([2])}
    signature.check(own)
    assert own["lengths"].tolist() == [2]
    with pytest.raises(MissingInput, match="'x'"):
        signature.check({"lengths": np.array([2])})
