"""Requests of different lengths share batches on a real server, and nobody's answer shows it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.support.packages import run_reference
from tests.support.server import ROOT, Server, serve
from tests.support.transformer import PAD, masked_transformer
from tests.unit.builder.models import save
from vernier.builder.graphs.shapes import parse_shape
from vernier.builder.pipeline import build
from vernier.builder.progress import NoProgress
from vernier.builder.request import BuildRequest

SPEECH = ROOT / "examples/speech/model.onnx"
Inputs = dict[str, np.ndarray]


def build_text(folder: Path, name: str, mask_input: bool) -> None:
    model = save(masked_transformer(mask_input), folder / f"{name}.onnx")
    shapes = ["ids=1x1:8x24:16x64"] + (["attention_mask=1x1:8x24:16x64"] if mask_input else [])
    outcome = build(
        BuildRequest(
            model,
            name,
            folder / "engines",
            shapes=dict(parse_shape(text) for text in shapes),
            sequence={"tokens": [16, 32, 64]},
            pad_values={} if mask_input else {"ids": PAD},
        ),
        NoProgress(),
    )
    (rule,) = outcome.manifest.sequence
    assert rule.crop_outputs
    assert rule.mask_input == ("attention_mask" if mask_input else None)
    assert rule.pad_values == ({} if mask_input else {"ids": PAD})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`masked` (an attention mask), `padded` (a pad id) and `keywords` (lengths), one slot for each."""
    folder = tmp_path_factory.mktemp("sequences")
    build_text(folder, "masked", True)
    build_text(folder, "padded", False)
    shapes = dict([parse_shape("features=1x10x40:8x100x40:8x200x40"), parse_shape("lengths=1:8:8")])
    build(BuildRequest(SPEECH, "keywords", folder / "engines", shapes=shapes), NoProgress())
    config = folder / "vernier.toml"
    config.write_text("[models.keywords]\nsequence_buckets = { frames = [64, 200] }\n")
    with serve(folder / "engines", folder / "log", slots="1", config=str(config)) as server:
        yield server


def texts(mask: bool) -> list[Inputs]:
    rng = np.random.default_rng(0)
    made = [{"ids": rng.integers(2, 40, (1 + n % 2, 1 + 5 * n % 63))} for n in range(24)]
    return [{**one, "attention_mask": np.ones_like(one["ids"])} if mask else one for one in made]


def clips() -> list[Inputs]:
    rng = np.random.default_rng(1)
    sizes = [10 + 13 * n % 190 for n in range(16)]
    return [
        {"features": rng.normal(size=(1, n, 40)).astype(np.float32), "lengths": np.array([n])} for n in sizes
    ]


@pytest.mark.parametrize("name", ["masked", "padded", "keywords"])
def test_every_length_gets_the_answer_it_gets_alone(server: Server, name: str) -> None:
    model = onnx.load(SPEECH) if name == "keywords" else masked_transformer(name == "masked")
    requests = clips() if name == "keywords" else texts(name == "masked")

    def ask(inputs: Inputs) -> dict[str, Any]:
        # Lengths and masks of whole requests may be left out.
        sent = {k: v.tolist() for k, v in inputs.items() if k in ("ids", "features")}
        response = server.predict(sent, model=name)
        assert response.status_code == 200, response.text
        return response.json()["outputs"]

    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(ask, requests))
    for inputs, answer in zip(requests, answers, strict=True):
        for output, expected in run_reference(model, inputs).items():
            got = np.array(answer[output], np.float32)
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-4)
    useful = server.metric("vernier_useful_elements_total", model=name)
    assert 0 < useful < server.metric("vernier_padded_elements_total", model=name)
