"""The short cut and the careful decoder give the same tensor or the same refusal for any JSON whatever."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from vernier.api.formats.codecs import parse_predict
from vernier.api.formats.json_tensors import count_lists, decode_values
from vernier.border.signature import Signature
from vernier.errors import RequestError
from vernier.tensors import DTYPES, Arrays, TensorSpec, numpy_dtype

NUMBERS = [name for name in DTYPES if name not in ("bool", "float16")]
#: Larger integers are rounded once by one decoder and twice by the other on their way to a narrow float.
EXACT = 2**53

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-EXACT, EXACT),
    st.integers(2**63 - 2, 2**64 + 2),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(alphabet='[]{}",a\\é', max_size=3),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=12)


def signature_of(*specs: TensorSpec) -> Signature:
    return Signature(
        "m", {spec.name: spec for spec in specs}, {}, {}, batch_dim="batch", fixed_batch=None, derived={}
    )


def outcome(decode: Any) -> Any:
    try:
        found: Arrays = decode()
    except RequestError as error:
        return type(error), error.message
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in found.items()}


@settings(max_examples=400)
@given(values, values, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 4))
@example([[1, 2], [3], [4, 5, 6]], [[0]], "float32", "int8", 2)
@example([[1, [2]], [3, 4]], [], "float64", "int64", 2)
def test_both_decoders_agree_on_any_value(x: Any, y: Any, first: str, second: str, rank: int) -> None:
    shape = ("batch", "a", "b", "c")[:rank]
    signature = signature_of(TensorSpec("x", first, shape), TensorSpec("y", second, ("batch",)))
    inputs = {"x": x, "y": y}
    body = json.dumps({"inputs": inputs, "outputs": None}).encode()
    careful = outcome(lambda: decode_values(orjson.loads(body)["inputs"], signature))
    assert outcome(lambda: parse_predict(body)[1].decode(signature)) == careful


@given(st.data(), st.sampled_from(NUMBERS))
def test_every_number_of_every_dtype_comes_back(data: st.DataObject, dtype: str) -> None:
    shape = data.draw(array_shapes(max_dims=4, max_side=4))
    elements: dict[str, Any] = (
        {"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else {}
    )
    array = data.draw(arrays(numpy_dtype(dtype), shape, elements=elements))
    body = orjson.dumps({"inputs": {"x": array}}, option=orjson.OPT_SERIALIZE_NUMPY)
    spec = TensorSpec("x", dtype, tuple(f"d{i}" for i in range(array.ndim)))
    decoded = parse_predict(body)[1].decode(signature_of(spec))["x"]
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


@settings(max_examples=200)
@given(st.binary(max_size=40), st.sampled_from([b'{"inputs": {"x": [[1, 2]]}', b'{"inputs": {"x": [[', b""]))
def test_any_bytes_are_read_or_refused(tail: bytes, start: bytes) -> None:
    signature = signature_of(TensorSpec("x", "float32", ("batch", "n")))
    try:
        arrays = parse_predict(start + tail)[1].decode(signature)
    except RequestError as error:
        assert error.http_status == 400
    else:
        assert all(np.isfinite(array).all() for array in arrays.values())


@settings(max_examples=30, deadline=None)
@given(
    st.binary(max_size=50),
    st.integers(0, 200_000),
    st.sampled_from(b"1,]["),
    st.integers(0, 3_000),
)
def test_lists_are_counted_alike_in_short_and_in_long_texts(
    start: bytes, filled: int, byte: int, more: int
) -> None:
    text = start + bytes([byte]) * filled + b"[" * more + start + bytes([byte]) * more
    assert count_lists(text) == text.count(b"[")
