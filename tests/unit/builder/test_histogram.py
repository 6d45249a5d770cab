"""Histograms do not depend on how the data came, and scales follow from them as their definitions say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vernier.builder.quantizing.histogram import (
    BINS,
    MagnitudeHistogram,
    entropy_scale,
    errors,
    minmax_scale,
    mse_scale,
    percentile_scale,
)


def counted(values: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    histogram.add(values.astype(np.float32))
    return histogram


def quantization_error(values: np.ndarray, scale: float) -> float:
    rounded = np.clip(np.rint(values / scale), -127, 127) * scale
    return float(np.mean(np.square(rounded - values, dtype=np.float64)))


NORMAL = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.floats(-1e6, 1e6, width=32) | st.floats(-(2.0**-9), 2.0**-9, width=32), min_size=1, max_size=200
    ),
    st.data(),
)
def test_order_and_batches_make_no_difference(values: list[float], data: st.DataObject) -> None:
    array = np.array(values, np.float32)
    whole, pieces = MagnitudeHistogram(), MagnitudeHistogram()
    whole.add(array)
    shuffled = np.array(data.draw(st.permutations(values)), np.float32)
    cut = data.draw(st.integers(0, len(values)))
    pieces.add(shuffled[:cut])
    pieces.add(shuffled[cut:])
    assert np.array_equal(whole.counts, pieces.counts)
    assert (whole.exponent, whole.zeros, whole.peak) == (pieces.exponent, pieces.zeros, pieces.peak)
    assert whole.total == len(values)
    assert whole.peak == np.abs(array).max()


def test_zeros_and_non_finite_numbers_are_kept_apart() -> None:
    histogram = counted(np.array([0, -0.0, 1, np.inf, np.nan, -2]))
    assert (histogram.zeros, histogram.nonfinite, histogram.peak) == (2, 2, 2.0)
    assert histogram.counts.sum() == 2
    empty = counted(np.array([0.0, 0.0]))
    assert all(scale(empty) > 0 for scale in (minmax_scale, percentile_scale, mse_scale, entropy_scale))
    histogram.add(np.zeros((0, 3), np.float32))
    assert histogram.total == 4


@pytest.mark.parametrize("size", [1, 1000, 1024, 50_000])
def test_some_numbers_of_each_sample_stand_for_all(size: int) -> None:
    values = np.random.default_rng(3).standard_normal((20, size)).astype(np.float32)
    values[7, size // 2] = 100.0
    some, pieces = MagnitudeHistogram(), MagnitudeHistogram()
    some.add_some(values, 512)
    for start in range(0, 20, 3):
        part = MagnitudeHistogram()
        part.add_some(values[start : start + 3], 512)
        pieces.merge(part)
    assert some.peak == 100.0
    assert 20 * min(340, size) <= some.total <= 20 * min(1000 if size == 1000 else 520, size)
    assert np.array_equal(some.counts, pieces.counts)
    assert (some.zeros, some.exponent, some.peak) == (pieces.zeros, pieces.exponent, pieces.peak)
    if size > 1024:
        exact = counted(values)
        assert percentile_scale(some, 99.0) == pytest.approx(percentile_scale(exact, 99.0), rel=0.05)


def test_every_channel_and_place_is_among_some_numbers() -> None:
    values = np.zeros((1, 64, 56, 56), np.float32)
    for channel in range(64):
        values[:] = 0
        values[0, channel] = 1
        histogram = MagnitudeHistogram()
        histogram.add_some(values, 8192)
        assert histogram.counts.sum() == pytest.approx(8192 / 64, rel=0.25)


def test_merging_is_adding() -> None:
    whole, other = MagnitudeHistogram(), MagnitudeHistogram()
    small, large = NORMAL[:500] * np.float32(1e-3), NORMAL[500:900] * np.float32(1e3)
    whole.add(small)
    whole.add(large)
    for first, second in ((small, large), (large, small)):
        merged, other = MagnitudeHistogram(), MagnitudeHistogram()
        merged.add(first)
        other.add(second)
        merged.merge(other)
        assert np.array_equal(merged.counts, whole.counts)
        assert (merged.peak, merged.exponent, merged.zeros) == (whole.peak, whole.exponent, whole.zeros)


def test_the_state_brings_a_histogram_back() -> None:
    histogram = counted(NORMAL)
    again = MagnitudeHistogram.restore(histogram.state())
    assert np.array_equal(again.counts, histogram.counts)
    assert again.state().keys() == histogram.state().keys()
    again.add(NORMAL * 3)
    histogram.add(NORMAL * 3)
    assert np.array_equal(again.counts, histogram.counts)
    with pytest.raises(ValueError):
        MagnitudeHistogram.restore({**histogram.state(), "counts": np.zeros(3)})


def test_minmax_clips_nothing() -> None:
    for size in (1, 10, 1000):
        values = NORMAL[:size] * 37
        assert minmax_scale(counted(values)) * 127 >= np.abs(values).max()
        assert minmax_scale(counted(values)) * 127 <= np.abs(values).max() * 1.008


def test_percentile_keeps_its_share() -> None:
    scale = percentile_scale(counted(NORMAL), 99.0)
    clipped = np.mean(np.abs(NORMAL) > scale * 127)
    assert 0.005 < clipped <= 0.01
    spiky = np.append(NORMAL, [1000.0])
    assert percentile_scale(counted(spiky)) < 0.01 * minmax_scale(counted(spiky))


@pytest.mark.parametrize("shrink", [1.0, 0.7, 0.4, 0.1])
def test_errors_are_those_of_quantizing_the_numbers_themselves(shrink: float) -> None:
    for values in (NORMAL, np.maximum(NORMAL, 0), np.exp(NORMAL)):
        histogram = counted(values)
        scale = minmax_scale(histogram) * shrink
        assert errors(histogram, np.array([scale]))[0] == pytest.approx(
            quantization_error(values, scale), rel=0.02
        )


@pytest.mark.parametrize("shape", ["normal", "laplace", "relu", "spike"])
def test_mse_finds_the_best_scale_there_is(shape: str) -> None:
    random = np.random.default_rng(1)
    values = {
        "normal": NORMAL,
        "laplace": random.laplace(size=100_000),
        "relu": np.maximum(NORMAL, 0),
        "spike": np.append(NORMAL, [60.0]),
    }[shape].astype(np.float32)
    histogram = counted(values)
    found = quantization_error(values, mse_scale(histogram))
    peak = float(np.abs(values).max())
    best = min(quantization_error(values, peak / 127 * share) for share in np.linspace(0.02, 1, 200))
    assert found <= 1.02 * best


def test_entropy_is_not_minmax_where_outliers_are_rare() -> None:
    """A stock quantizer's entropy method gives minmax's scales exactly; this one must not."""
    values = np.append(NORMAL, np.full(5, 40.0, np.float32))
    scale = entropy_scale(counted(values))
    assert scale < 0.3 * minmax_scale(counted(values))
    assert scale * 127 > 2.5
    # Without outliers it keeps most of the range, and never more than all of it.
    flat = np.random.default_rng(2).uniform(-1, 1, 100_000)
    assert 0.95 < entropy_scale(counted(flat)) / minmax_scale(counted(flat)) <= 1


def test_entropy_of_a_handful_of_numbers_is_minmax() -> None:
    few = counted(NORMAL[:300])
    assert entropy_scale(few) == minmax_scale(few)


def test_memory_is_fixed() -> None:
    histogram = MagnitudeHistogram()
    for exponent in range(-20, 20):
        histogram.add(NORMAL[:1000] * np.float32(2.0**exponent))
    assert histogram.counts.shape == (BINS,)
    assert histogram.total == 40_000
