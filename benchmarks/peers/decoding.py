"""How long an image in JSON takes to become an array: the service's decoder beside orjson and NumPy, in one process."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import orjson

from benchmarks.peers.workloads import IMAGE
from vernier.api.formats.codecs import parse_predict
from vernier.border.signature import Signature
from vernier.tensors import TensorSpec


def decoding(rounds: int = 15) -> dict[str, list[float]]:
    """Milliseconds for each round of either, in turns, on one 3×224×224 float32 image. Checks that both agree."""
    x = np.random.default_rng(5).normal(size=(1, *IMAGE)).astype(np.float32)
    body = orjson.dumps({"model": "m", "inputs": {"x": x}}, option=orjson.OPT_SERIALIZE_NUMPY)
    signature = Signature(
        model="m",
        inputs={"x": TensorSpec("x", "float32", ("batch", *IMAGE))},
        outputs={"y": TensorSpec("y", "float32", ("batch", 2))},
        ranges={},
        batch_dim="batch",
        fixed_batch=None,
        derived={},
    )
    took: dict[str, list[float]] = {"vernier": [], "orjson and NumPy": []}
    for turn in range(rounds + 2):  # the first two warm up
        began = perf_counter()
        ours = parse_predict(body)[1].decode(signature)["x"]
        middle = perf_counter()
        theirs = np.asarray(orjson.loads(body)["inputs"]["x"], np.float32)
        ended = perf_counter()
        if not (np.array_equal(ours, x) and np.array_equal(theirs, x)):
            raise AssertionError("a decoder gives other numbers than were sent")
        if turn >= 2:
            took["vernier"].append((middle - began) * 1e3)
            took["orjson and NumPy"].append((ended - middle) * 1e3)
    return took
