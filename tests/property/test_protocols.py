"""The protocols' codecs: any tensor comes through every way bit by bit, and no body does anything but fail in words."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from vernier.api.grpc.codec import encode_model_infer, parse_model_infer
from vernier.api.grpc.schema import ModelInferRequest, ModelInferResponse
from vernier.api.v2.answers import encode_infer
from vernier.api.v2.requests import HEADER_LENGTH, InferRequest, json_bytes, parse_infer
from vernier.border.batch import Answer
from vernier.border.signature import Signature
from vernier.errors import RequestError
from vernier.tensors import DTYPES, Arrays, TensorSpec, numpy_dtype, protocol_dtype

WAYS = ("JSON", "binary", "typed", "raw")


def signature_of(arrays: Arrays) -> Signature:
    """A model that takes arrays of these ranks, with every dimension free."""
    specs = {
        name: TensorSpec(name, array.dtype.name, tuple(f"{name}{axis}" for axis in range(array.ndim)))
        for name, array in arrays.items()
    }
    return Signature("m", specs, {}, {}, None, None, {})


@st.composite
def tensors(draw: st.DrawFn) -> Arrays:
    """Up to three arrays of any dtype; some have no dimension, some no elements, some are strided views."""
    arrays: Arrays = {}
    for name in draw(st.sampled_from(["x", "xy", "xyz"])):
        dtype = numpy_dtype(draw(st.sampled_from(DTYPES)))
        shape = draw(st_np.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        numbers: Any = None
        if dtype.kind == "f":
            bits = np.finfo(dtype).bits
            numbers = st.floats(allow_nan=False, allow_infinity=False, width=bits)  # type: ignore[arg-type]
        array = draw(st_np.arrays(dtype, shape, elements=numbers))
        if array.ndim and draw(st.booleans()):
            array = array[..., ::-1] if draw(st.booleans()) else array.T
        arrays[name] = array
    return arrays


def rest(arrays: Arrays, binary: bool, nested: bool) -> tuple[bytes, int | None]:
    """A request as a client writes it."""
    inputs, tail = [], b""
    for name, array in arrays.items():
        entry: dict[str, Any] = {
            "name": name,
            "datatype": protocol_dtype(array.dtype.name),
            "shape": array.shape,
        }
        if binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            entry["data"] = array.tolist() if nested or array.ndim == 0 else array.reshape(-1).tolist()
        inputs.append(entry)
    text = orjson.dumps({"inputs": inputs})
    return text + tail, len(text) if binary else None


_FIELDS = {
    "bool": "bool", "int8": "int", "int16": "int", "int32": "int", "int64": "int64", "uint8": "uint",
    "uint16": "uint", "uint32": "uint", "uint64": "uint64", "float32": "fp32", "float64": "fp64",
}  # fmt: skip


def grpc(arrays: Arrays, typed: bool) -> bytes:
    message = ModelInferRequest(model_name="m")
    for name, array in arrays.items():
        tensor = message.inputs.add(name=name, datatype=protocol_dtype(array.dtype.name), shape=array.shape)
        if typed:
            field = getattr(tensor.contents, f"{_FIELDS[array.dtype.name]}_contents")
            field.extend(array.reshape(-1).tolist())
        else:
            message.raw_input_contents.append(array.tobytes())
    encoded: bytes = message.SerializeToString()
    return encoded


def same(found: Arrays, sent: Arrays) -> None:
    assert list(found) == list(sent)
    for name, array in sent.items():
        back = found[name]
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
        assert back.flags.aligned


@given(tensors(), st.booleans())
def test_inputs_arrive_bit_by_bit(arrays: Arrays, nested: bool) -> None:
    signature = signature_of(arrays)
    for binary in (False, True):
        body, header_bytes = rest(arrays, binary, nested)
        _, inputs = parse_infer(body, header_bytes, "m", None)
        same(inputs.decode(signature), arrays)
    same(parse_model_infer(grpc(arrays, typed=False))[1].decode(signature), arrays)
    if all(array.dtype != np.float16 for array in arrays.values()):
        same(parse_model_infer(grpc(arrays, typed=True))[1].decode(signature), arrays)


@given(tensors())
def test_outputs_leave_bit_by_bit(arrays: Arrays) -> None:
    answer = Answer(arrays, "fp32", 0.0, 0.0, 1)
    for binary in (False, True):
        body, headers = encode_infer(InferRequest(binary=binary), "id", "m", "1", answer)
        stop = int(headers.get(HEADER_LENGTH, len(body)))
        at, found = stop, {}
        for output in orjson.loads(body[:stop])["outputs"]:
            dtype = arrays[output["name"]].dtype
            assert output["datatype"] == protocol_dtype(dtype.name)
            if binary:
                end = at + output["parameters"]["binary_data_size"]
                array = np.frombuffer(body[at:end], dtype)
                at = end
            else:
                array = np.array(output["data"], dtype)
            found[output["name"]] = array.reshape(output["shape"])
        assert at == len(body)
        same(found, arrays)
        message = ModelInferResponse.FromString(
            encode_model_infer(InferRequest(binary=binary), "id", "m", "1", answer).SerializeToString()
        )
        found = {}
        for index, output in enumerate(message.outputs):
            dtype = arrays[output.name].dtype
            if message.raw_output_contents:
                array = np.frombuffer(message.raw_output_contents[index], dtype)
            else:
                field = getattr(output.contents, f"{_FIELDS[dtype.name]}_contents")
                array = np.array(field, dtype)
            found[output.name] = array.reshape(tuple(output.shape))
        same(found, arrays)


# --- what clients get wrong -----------------------------------------------------------------------
SIGNATURE = Signature(
    "m",
    {
        "x": TensorSpec("x", "float32", ("batch", 2)),
        "n": TensorSpec("n", "int64", ("batch",)),
        "b": TensorSpec("b", "bool", ("batch",)),
    },
    {},
    {},
    "batch",
    None,
    {},
)
GOOD: Arrays = {
    "x": np.array([[1.5, -2.0], [0.0, 3.25]], np.float32),
    "n": np.array([-(2**63), 2**63 - 1]),
    "b": np.array([True, False]),
}
#: What mutations put in: brackets, limits, what the parsers look for.
_PIECES = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"NaN", b"-1", b"1e999", b"9" * 40, b"0.5",
    b'"inputs"', b'"shape"', b'"data"', b'"binary_data_size"', b'"parameters"', b'"name":"x"', b"\x00", b"\xff\xff",
    b'"BYTES"', b'"FP16"', b'"datatype"', b"[" * 300, b'"shared_memory_region"', b"\x7f\x80\x80\x80\x80", b"",
]  # fmt: skip


def mutated(rng: random.Random, body: bytes) -> bytes:
    """The body with up to six parts of it changed, taken out, doubled or swapped."""
    data = bytearray(body)
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((0, 1, 1, 2, 8, 40)))
        match rng.randrange(4):
            case 0:
                data[start:stop] = rng.choice(_PIECES)
            case 1:
                data[start:stop] = rng.randbytes(stop - start)
            case 2:
                data[start:start] = data[start:stop] * rng.choice((1, 2, 20))
            case _:
                del data[start:stop]
    return bytes(data)


def header_of(rng: random.Random, header_bytes: int | None) -> str | None:
    if rng.random() < 0.7:
        return None if header_bytes is None else str(header_bytes)
    odd = ["", "0", "-1", "1e3", "٣", " 12 ", "9" * 30, "0x10", str(2**64), "12,12", "None"]
    return rng.choice([*odd, str(rng.randrange(400)), None])


@pytest.mark.parametrize("way", WAYS)
def test_5000_mutated_bodies_are_read_or_refused_in_words(way: str) -> None:
    rng = random.Random(f"{way} 20261130")
    outcomes = {"read": 0, "refused": 0}
    for _ in range(5000):
        binary = way == "binary"
        body, header_bytes = rest(GOOD, binary, rng.random() < 0.5)
        if way in ("typed", "raw"):
            body, header_bytes = grpc(GOOD, way == "typed"), None
        body = mutated(rng, body)
        try:
            if way in ("typed", "raw"):
                request, inputs = parse_model_infer(body)
            else:
                stop = json_bytes(header_of(rng, header_bytes), len(body))
                request, inputs = parse_infer(body, stop, "m", None)
            SIGNATURE.select_outputs(request.outputs)
            arrays = inputs.decode(SIGNATURE)
            SIGNATURE.check(arrays, inputs.finite)
        except RequestError as error:
            assert 10 < len(error.message) < 1500, error.message[:2000]
            outcomes["refused"] += 1
        else:
            assert all(np.isfinite(array).all() for array in arrays.values())
            outcomes["read"] += 1
    assert min(outcomes.values()) > 50, outcomes
