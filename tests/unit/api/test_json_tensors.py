"""JSON to tensors: what the short cut takes, what it leaves to the careful decoder, and which code that gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
import pytest

from tests.support.specs import make_signature
from vernier.api.formats import codecs, json_tensors
from vernier.api.formats.codecs import NumberInputs, ValueInputs, parse_predict
from vernier.api.formats.json_tensors import tensor_from_json
from vernier.border.signature import Signature
from vernier.errors import NonFiniteInput, RequestError, UnknownInput, WrongDtype, WrongShape
from vernier.tensors import Array, TensorSpec

FLOATS = TensorSpec("x", "float32", ("batch", 2))
INTEGERS = TensorSpec("x", "int32", ("batch", 2))
BOOLEANS = TensorSpec("x", "bool", ("batch", 2))


@pytest.mark.parametrize(
    ("spec", "text", "error"),
    [
        (FLOATS, "[[1, 2], [3]]", WrongShape),
        (FLOATS, "[[1, 2], 3]", WrongShape),
        (FLOATS, '[["1", "2"]]', WrongDtype),
        (FLOATS, '[[1, "2"]]', WrongDtype),
        (FLOATS, '"text"', WrongDtype),
        (FLOATS, "[[1, null]]", WrongDtype),
        (FLOATS, '[[1, {"a": 1}]]', WrongDtype),
        (FLOATS, "[[true, false]]", WrongDtype),
        (FLOATS, "[[1, true]]", WrongDtype),
        (FLOATS, "[[1, 1e39]]", NonFiniteInput),
        (INTEGERS, "[[1, 2.5]]", WrongDtype),
        (INTEGERS, "[[1, 2147483648]]", WrongDtype),
        (INTEGERS, "[[1, -2147483649]]", WrongDtype),
        (INTEGERS, "[[1, 18446744073709551615]]", WrongDtype),
        (INTEGERS, "[[1, 99999999999999999999999]]", WrongDtype),
        (BOOLEANS, "[[1, 0]]", WrongDtype),
        (BOOLEANS, "[[true, 0]]", WrongDtype),
    ],
)
def test_values_that_are_not_the_tensors_are_refused(
    spec: TensorSpec, text: str, error: type[RequestError]
) -> None:
    with pytest.raises(error) as caught:
        tensor_from_json(spec, orjson.loads(text))
    assert "'x'" in caught.value.message
    with pytest.raises(error) as by_the_short_cut:
        decode(spec, text)
    assert by_the_short_cut.value.message == caught.value.message


def test_integers_are_taken_for_floats_and_booleans_for_bool() -> None:
    assert tensor_from_json(FLOATS, [[1, 2.5]]).dtype == np.float32
    assert tensor_from_json(BOOLEANS, [[True, False]]).dtype == np.bool_
    assert tensor_from_json(INTEGERS, [[2147483647, -2147483648]]).tolist() == [[2147483647, -2147483648]]


def signature_of(dtype: str, shape: list[int | str]) -> Signature:
    ranges = {d: {"min": 1, "opt": 2, "max": 8} for d in shape if isinstance(d, str)}
    return make_signature(inputs=[{"name": "x", "dtype": dtype, "shape": shape}], dims=ranges)


def decode(spec: TensorSpec, text: str, fields: str = "") -> Array:
    """Through the envelope, as a request comes."""
    envelope = f'{{"inputs": {{"x": {text}}}{fields}}}'.encode()
    return parse_predict(envelope)[1].decode(signature_of(spec.dtype, list(spec.shape)))["x"]


@pytest.fixture
def careful(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes when the careful decoder is asked."""
    asked: list[str] = []

    def decode_values(*args: Any) -> Any:
        asked.append("careful")
        return json_tensors.decode_values(*args)

    monkeypatch.setattr(codecs, "decode_values", decode_values)
    return asked


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        ("float32", "[[1, 2.5], [-3e-3, 16777217]]"),
        ("float64", "[[1.7976931348623157e308, 0.1]]"),
        ("float16", "[[60000, -0.5]]"),
        ("int64", "[[9223372036854775807, -9223372036854775808]]"),
        ("uint64", "[[18446744073709551615, 0]]"),
        ("int8", "[[-128, 127]]"),
        ("uint32", "[[4294967295, 0]]"),
    ],
)
def test_numbers_take_the_short_cut(dtype: str, text: str, careful: list[str]) -> None:
    spec = TensorSpec("x", dtype, ("batch", 2))
    array = decode(spec, text, ', "outputs": ["y"], "model": "m"')
    expected = tensor_from_json(spec, orjson.loads(text))
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(array, expected)
    assert not careful


def test_many_numbers_take_the_short_cut_in_any_rank(careful: list[str]) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 40, 50)).astype(np.float32)
    text = orjson.dumps(images, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    np.testing.assert_array_equal(decode(TensorSpec("x", "float32", ("batch", 3, 40, 50)), text), images)
    assert not careful


def test_a_number_too_large_among_many_is_found() -> None:
    text = str([[1.0] * 5000, [1.0] * 4999 + [1e39]])
    with pytest.raises(NonFiniteInput, match=r"\[1, 4999\]"):
        decode(TensorSpec("x", "float32", ("batch", 5000)), text)


@pytest.mark.parametrize(
    "text",
    [
        "[[1, 2], [3], [4, 5, 6]]",  # as many numbers as an even list would have
        "[[1, [2]], [3, 4]]",
        "[[[1], 2], [3, 4]]",
        "[[1, 2], [], [3, 4, 5, 6]]",
        "[[1, 2], 3, 4]",
        "[1, 2]",
        "[[[1, 2]]]",
        "[]",
        "[[]]",
        "3",
    ],
)
def test_no_list_hides_among_numbers(text: str) -> None:
    spec = TensorSpec("x", "float32", ("batch", 2))
    try:
        expected: Any = tensor_from_json(spec, orjson.loads(text)).shape
    except WrongShape as error:
        expected = error.message
    try:
        found: Any = decode(spec, text).shape
    except WrongShape as error:
        found = error.message
    assert found == expected


@pytest.mark.parametrize(
    "fields", [', "id": "[["', ', "model": "a[b"', ', "inputs": {"x": [[3, 4]]}', ', "model": null']
)
def test_what_is_odd_around_the_numbers_changes_nothing(fields: str) -> None:
    expected = [[3, 4]] if "inputs" in fields else [[1, 2]]
    assert decode(FLOATS, "[[1, 2]]", fields).tolist() == expected


def test_of_a_name_given_twice_the_last_counts_as_in_other_parsers() -> None:
    signature = make_signature()
    body = b'{"inputs": {"dense": [[1, 2, 3]], "ids": [[1, 2]], "dense": [[4, 5, 6]]}}'
    assert parse_predict(body)[1].decode(signature)["dense"].tolist() == [[4, 5, 6]]


def test_an_unknown_input_among_known_ones_is_named() -> None:
    with pytest.raises(UnknownInput, match="'other'"):
        parse_predict(b'{"inputs": {"dense": [[1, 2, 3]], "other": [[1]]}}')[1].decode(make_signature())


def test_a_body_that_is_held_does_not_stop_the_next() -> None:
    signature = signature_of("float32", ["batch", 2])
    held = [parse_predict(b'{"inputs": {"x": [[%d, 0]]}}' % n)[1] for n in range(3)]
    assert all(isinstance(inputs, NumberInputs) for inputs in held)
    assert [inputs.decode(signature)["x"][0, 0] for inputs in held] == [0, 1, 2]


def test_arrays_outlive_their_body_and_the_parser(careful: list[str]) -> None:
    signature = signature_of("float64", ["batch", 1])
    arrays = [
        parse_predict(bytearray(b'{"inputs": {"x": [[%d]]}}' % n))[1].decode(signature)["x"]
        for n in range(50)
    ]
    assert [float(array[0, 0]) for array in arrays] == list(range(50))
    assert not careful


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b"\x00", b"[", b"1 "])
def test_what_is_not_json_is_refused_as_before(prefix: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_predict(prefix + b'{"inputs": {"x": [[1, 2]]}}')
    assert caught.value.code == "invalid_json"


def test_deep_nesting_is_refused_and_the_next_body_is_read() -> None:
    with pytest.raises(RequestError):
        parse_predict(b'{"inputs": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}")
    assert decode(FLOATS, "[[1, 2]]").tolist() == [[1, 2]]


def test_text_and_null_are_left_to_the_careful_decoder(careful: list[str]) -> None:
    assert decode(BOOLEANS, "[[true, false]]").tolist() == [[True, False]]
    assert careful
    assert isinstance(parse_predict(b'{"inputs": {"x": [1]}, "inputs": {}}')[1], ValueInputs)
    assert math.isclose(decode(TensorSpec("x", "float64", ()), "2.5").item(), 2.5)
