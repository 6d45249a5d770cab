"""The v1 codec: what is taken, and which code each bad input gets."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from tests.support.specs import make_signature
from vernier.api.formats.codecs import (
    encode_answer,
    encode_error,
    parse_predict,
    raw_envelope,
    tensor_from_bytes,
)
from vernier.border.batch import Answer
from vernier.errors import (
    InvalidJson,
    MissingInput,
    NonFiniteInput,
    RequestError,
    UnknownInput,
    UnsupportedMediaType,
    WrongShape,
)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", InvalidJson),
        (b"{", InvalidJson),
        (b"[1, 2]", InvalidJson),
        (b"null", InvalidJson),
        (b'{"inputs": {"x": [NaN]}}', NonFiniteInput),
        (b'{"inputs": {"x": [-Infinity]}}', NonFiniteInput),
        (b"{}", MissingInput),
        (b'{"inputs": null}', MissingInput),
        (b'{"inputs": [1]}', InvalidJson),
        (b'{"inputs": {}, "input": {}}', InvalidJson),
        (b'{"inputs": {}, "model": 3}', InvalidJson),
        (b'{"inputs": {}, "outputs": "score"}', InvalidJson),
        (b'{"inputs": {}, "outputs": [1]}', InvalidJson),
        (b'{"inputs": {}, "priority": true}', InvalidJson),
        (b'{"inputs": {}, "priority": 10}', InvalidJson),
        (b'{"inputs": {}, "timeout_ms": -1}', InvalidJson),
        (b'{"inputs": {}, "timeout_ms": "5"}', InvalidJson),
        (b'{"inputs": {}, "timeout_ms": true}', InvalidJson),
        (b'{"inputs": {}, "id": 5}', InvalidJson),
    ],
)
def test_a_bad_envelope_is_refused_with_a_sentence(body: bytes, error: type[RequestError]) -> None:
    with pytest.raises(error) as caught:
        parse_predict(body)
    assert len(caught.value.message) > 20


def test_an_envelope_is_read_whole() -> None:
    request, _ = parse_predict(
        b'{"model": "m", "version": 3, "inputs": {"x": [1]}, "outputs": ["y"], "precision": "fp32",'
        b' "priority": 2, "timeout_ms": 0, "id": "abc"}'
    )
    assert (request.model, request.version, request.outputs, request.precision) == ("m", "3", ["y"], "fp32")
    assert (request.priority, request.timeout_ms, request.id) == (2, 0.0, "abc")


def test_an_unknown_input_names_the_known_ones() -> None:
    with pytest.raises(UnknownInput, match="'dense', 'ids'"):
        parse_predict(b'{"inputs": {"dens": [[1]]}}')[1].decode(make_signature())


@pytest.mark.parametrize(
    "query", [{"priority": "10"}, {"priority": "high"}, {"timeout_ms": "-1"}, {"timeout_ms": "nan"}]
)
def test_a_bad_query_string_of_a_raw_body_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(InvalidJson):
        raw_envelope(query)


def test_the_query_string_of_a_raw_body_is_read_whole() -> None:
    request = raw_envelope(
        {"model": "m", "version": "3", "outputs": "y,z", "priority": "-2", "timeout_ms": "5"}
    )
    assert (request.model, request.version, request.outputs) == ("m", "3", ["y", "z"])
    assert (request.priority, request.timeout_ms, request.id) == (-2, 5.0, None)


def single_input(shape: list[int | str]) -> dict[str, object]:
    ranges = {d: {"min": 1, "opt": 2, "max": 8} for d in shape if isinstance(d, str)}
    return {"inputs": [{"name": "x", "dtype": "float32", "shape": shape}], "dims": ranges}


def test_raw_bytes_become_the_single_input_without_a_copy() -> None:
    signature = make_signature(**single_input(["batch", 3]))
    body = np.arange(6, dtype="<f4").tobytes()
    array = tensor_from_bytes(body, signature)["x"]
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not array.flags.owndata


@pytest.mark.parametrize("size", [0, 1, 11, 13])
def test_raw_bytes_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(WrongShape, match="12"):
        tensor_from_bytes(b"\0" * size, make_signature(**single_input(["batch", 3])))


def test_raw_bytes_cannot_stand_for_several_inputs_or_several_unknown_sizes() -> None:
    with pytest.raises(UnsupportedMediaType):
        tensor_from_bytes(b"\0" * 12, make_signature())
    with pytest.raises(UnsupportedMediaType):
        tensor_from_bytes(b"\0" * 12, make_signature(**single_input(["batch", "frames"])))


def test_an_answer_carries_every_field_of_the_interface() -> None:
    outputs = {"score": np.array([[0.83]], np.float32)[:, ::-1]}
    body = encode_answer("abc", "ranker", "3", Answer(outputs, "int8", 0.0004, 0.0011, 16))
    assert orjson.loads(body) == {
        "id": "abc",
        "model": "ranker",
        "version": "3",
        "precision": "int8",
        "outputs": {"score": [[0.83]]},
        "timing": {"queue_ms": 0.4, "compute_ms": 1.1, "batch_size": 16},
    }


def test_an_error_is_a_sentence_and_a_code() -> None:
    assert orjson.loads(encode_error("Do this.", "wrong_shape")) == {
        "error": "Do this.",
        "code": "wrong_shape",
    }
