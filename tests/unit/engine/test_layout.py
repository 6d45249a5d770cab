from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vernier.engine.layout import ALIGNMENT, pack

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
dtypes = st.sampled_from([np.dtype(t) for t in (np.float32, np.float16, np.int8, np.int64, np.bool_)])


@given(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=6))
def test_tensors_never_overlap_and_stay_aligned_inside_their_block(
    tensors: list[tuple[np.dtype, tuple[int, ...]]],
) -> None:
    names = [f"t{i}" for i in range(len(tensors))]
    layout = pack(
        names,
        {n: d for n, (d, _) in zip(names, tensors, strict=True)},
        {n: s for n, (_, s) in zip(names, tensors, strict=True)},
    )
    block = np.zeros(layout.size, np.uint8)
    views = layout.views(block)
    for number, name in enumerate(names):
        assert views[name].dtype == tensors[number][0]
        assert views[name].shape == tensors[number][1]
        views[name].reshape(-1).view(np.uint8)[:] = number + 1
    for number, name in enumerate(names):
        assert (views[name].reshape(-1).view(np.uint8) == number + 1).all()
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)


def test_a_single_tensor_takes_its_own_bytes_and_no_more() -> None:
    assert pack(["x"], {"x": np.dtype(np.float32)}, {"x": (3, 5)}).size == 60
    assert pack(["x"], {"x": np.dtype(np.float32)}, {"x": (3, 5)}).addresses(1024) == [("x", 1024)]
