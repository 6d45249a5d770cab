"""Finiteness, which small and large arrays are asked for in different ways."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from vernier.tensors import is_finite


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", [1, 64, 5_000])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, -1])
def test_one_odd_number_anywhere_is_found(dtype: str, size: int, odd: float, at: int) -> None:
    array = np.linspace(-100.0, 100.0, size).astype(dtype).reshape(1, size)
    array[0, 0], array[0, -1] = np.finfo(dtype).max, np.finfo(dtype).min
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_finite(array)
        array[0, at] = odd
        assert not is_finite(array)


@pytest.mark.parametrize("shape", [(0,), (1, 0, 3), (5_000,), (3, 0, 5_000)])
def test_no_number_and_zeros_are_finite(shape: tuple[int, ...]) -> None:
    assert is_finite(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "unaligned", "big endian"])
def test_numbers_whose_sum_overflows_are_finite_and_an_odd_one_among_them_is_not(
    dtype: str, sign: int, layout: str
) -> None:
    largest = np.full((3, 4_000), sign * np.finfo(dtype).max, dtype)
    for at, odd in [(None, 0.0), (1, np.nan), (2, -np.nan), (-1, np.inf), (-2, -np.inf)]:
        array = largest.copy()
        if at is not None:
            array[1, at] = odd
        if layout == "strided":
            array = np.repeat(array, 2, axis=1)[:, ::2]
        elif layout == "unaligned":
            array = np.frombuffer(b"-" + array.tobytes(), np.uint8)[1:].view(dtype).reshape(array.shape)
        elif layout == "big endian":
            array = array.astype(array.dtype.newbyteorder(">"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert is_finite(array) == (at is None)
