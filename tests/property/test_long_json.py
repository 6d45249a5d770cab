"""What is refused in the parser's memory is what the careful decoder and the model's check refuse, with one error."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from simdjson import Parser

from vernier.api.formats.json_tensors import decode_values, judge_in_place
from vernier.border.signature import Signature
from vernier.errors import RequestError
from vernier.tensors import TensorSpec

SIGNATURE = Signature(
    model="m",
    inputs={"x": TensorSpec("x", "float32", ("batch", 2)), "k": TensorSpec("k", "int64", ("batch",))},
    outputs={},
    ranges={},
    batch_dim="batch",
    fixed_batch=None,
    derived={},
)
LEAVES = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.just("text"),
    st.just({}),
)
ROWS = st.lists(st.lists(LEAVES, min_size=2, max_size=2), max_size=4)
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=12)


def outcome(decode: Any) -> type[RequestError] | None:
    try:
        SIGNATURE.check(decode())
    except RequestError as error:
        return type(error)
    return None


@settings(max_examples=600)
@given(st.dictionaries(st.sampled_from(["x", "k", "other"]), st.one_of(ROWS, NESTED), min_size=1))
def test_errors_are_those_of_the_careful_decoder(inputs: dict[str, Any]) -> None:
    parsed = Parser().parse(json.dumps(inputs).encode())
    expected = {outcome(lambda: decode_values(inputs, SIGNATURE))}
    if len(inputs) > 1:  # of several faults either may be told
        expected |= {outcome(lambda v=v, n=n: decode_values({n: v}, SIGNATURE)) for n, v in inputs.items()}
    try:
        shapes = judge_in_place(parsed, SIGNATURE)
    except RequestError as error:
        assert type(error) in expected
        return
    if shapes is not None:
        assert expected != {None}
