"""What one execution makes of its outputs."""

from __future__ import annotations

import numpy as np
import pytest

from vernier.serving.scheduling.execution import finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("at", [(0, 0), (3, 7)])
def test_one_bad_value_anywhere_is_found(bad: float, dtype: type, at: tuple[int, int]) -> None:
    array = np.ones((4, 8), dtype)
    assert finite({"ids": np.zeros((4, 1), np.int64), "y": array})
    array[at] = bad
    assert not finite({"ids": np.zeros((4, 1), np.int64), "y": array})


def test_opposite_infinities_do_not_cancel_out() -> None:
    assert not finite({"y": np.array([np.inf, -np.inf], np.float32)})


def test_a_sum_that_overflows_is_no_proof() -> None:
    assert finite({"y": np.full(8, np.finfo(np.float64).max)})


def test_padding_rows_do_not_count() -> None:
    array = np.array([[1.0], [2.0], [np.nan]])
    assert finite({"y": array}, rows=2)
    assert not finite({"y": array}, rows=3)
