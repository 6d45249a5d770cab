"""Whatever a client sends, the codec either gives the tensor back exactly or raises a client error."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from vernier.api.formats.codecs import parse_predict
from vernier.api.formats.json_tensors import tensor_from_json
from vernier.errors import RequestError
from vernier.tensors import DTYPES, TensorSpec, numpy_dtype

NUMBERS = [name for name in DTYPES if name not in ("bool", "float16")]


@given(st.data(), st.sampled_from(NUMBERS))
def test_json_round_trips_every_number_of_every_dtype(data: st.DataObject, dtype: str) -> None:
    shape = data.draw(array_shapes(max_dims=3, max_side=4))
    elements: dict[str, Any] = (
        {"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else {}
    )
    array = data.draw(arrays(numpy_dtype(dtype), shape, elements=elements))
    text = orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    spec = TensorSpec("x", dtype, tuple(f"d{i}" for i in range(array.ndim)))
    decoded = tensor_from_json(spec, orjson.loads(text))
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300)
@given(JSON, st.sampled_from(DTYPES))
def test_any_value_decodes_or_is_a_client_error(value: Any, dtype: str) -> None:
    try:
        array = tensor_from_json(TensorSpec("x", dtype, ("batch",)), value)
    except RequestError as error:
        assert error.http_status == 400
    else:
        assert array.dtype == numpy_dtype(dtype)
        assert array.dtype.kind != "f" or np.isfinite(array).all()


@given(st.binary(max_size=60))
def test_any_body_parses_or_is_a_client_error(body: bytes) -> None:
    try:
        parse_predict(body)
    except RequestError as error:
        assert error.http_status == 400
