"""Both examples, built by the builder and served: FP32 answers are ONNX Runtime's own, whatever the batching."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.packages import run_reference
from tests.support.server import ROOT, Server, serve
from vernier.api.formats.schemas import EXAMPLE

EXAMPLES = {"ranker": "recommender", "keywords": "speech"}
CLIENTS = 200


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("examples")
    for name, folder in EXAMPLES.items():
        data = ROOT / "examples" / folder
        command = [sys.executable, "build_engine.py", str(data / "model.onnx"), "--name", name]
        options = ["--precision", "fp32", "--eval", str(data / "eval.npz"), "--out", str(root / "engines")]
        done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with serve(root / "engines", root / "log") as server:
        yield server


def samples(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "examples" / EXAMPLES[name] / "eval.npz") as archive:
        return {key: archive[key] for key in archive.files if key != "label"}


def request(name: str, seed: int) -> dict[str, np.ndarray]:
    """Between 1 and 9 random rows; clips are cut to the longest of the request, as a front end sends them."""
    rng = np.random.default_rng(seed)
    everything = samples(name)
    chosen = rng.choice(len(next(iter(everything.values()))), rng.integers(1, 10), replace=False)
    picked = {key: array[chosen] for key, array in everything.items()}
    if name == "keywords":
        picked["features"] = picked["features"][:, : int(picked["lengths"].max())]
    return picked


@pytest.mark.parametrize("name", EXAMPLES)
async def test_concurrent_clients_get_onnx_runtimes_own_answers(served: Server, name: str) -> None:
    model = ROOT / "examples" / EXAMPLES[name] / "model.onnx"
    worst = 0.0

    async def one(client: httpx.AsyncClient, seed: int) -> None:
        nonlocal worst
        inputs = request(name, seed)
        body = {"model": name, "precision": "fp32", "inputs": {k: v.tolist() for k, v in inputs.items()}}
        response = await client.post("/v1/predict", json=body)
        assert response.status_code == 200, response.text
        for output, expected in run_reference(model, inputs).items():
            answered = np.array(response.json()["outputs"][output], np.float32)
            assert answered.shape == expected.shape
            worst = max(worst, float(np.abs(answered - expected).max()))

    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=90) as client:
        await asyncio.gather(*(one(client, seed) for seed in range(CLIENTS)))
    # Padding a clip changes the order of float32 sums; everything else is exact to the last digits.
    assert worst <= (2e-6 if name == "keywords" else 1e-6)


def test_the_example_of_the_documentation_is_a_real_request(served: Server) -> None:
    response = httpx.post(served.url + "/v1/predict", json=EXAMPLE)
    assert response.status_code == 200
    (score,) = response.json()["outputs"]["score"]
    assert abs(score[0] - 0.81423545) < 1e-6


@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [("ranker", ["--user", "42"], "Top 10 of 500"), ("keywords", ["hello.wav"], "hello")],
)
def test_the_front_ends_run(served: Server, name: str, arguments: list[str], shown: str) -> None:
    script = ROOT / "examples" / EXAMPLES[name] / "frontend.py"
    command = [sys.executable, str(script), *arguments, "--url", served.url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.home())
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
